"""One choice of one request: run it, turn tokens into text, time it, and log its one ending before anyone sees it."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

import structlog

from engine.client import EngineGone
from engine.messages import Finished, PromptLogprobs, Tokens
from engine.text.stream import TextStream
from engine.text.tokenizer import Tokenizer
from services.errors import WhetError
from services.gateway.engine_link import EngineLink, Opened, gone, refusal
from services.gateway.log_spool import LogSpool
from services.gateway.metrics import Metrics
from services.gateway.planning import Plan
from services.gateway.spool_format import Final

LOWEST_LOGPROB = -1e4
NO_ENDING = Finished(epoch=0, id="", reason="stop")

log = structlog.get_logger()


class Parts(NamedTuple):
    """What a running gateway gives each request."""

    tokenizer: Tokenizer
    link: EngineLink
    spool: LogSpool
    metrics: Metrics


class Piece(NamedTuple):
    """Text that may be shown now and, where log-probabilities are wanted, the tokens it took since the piece before."""

    text: str
    token_ids: list[int]
    logprobs: list[float]


class Choice:
    """Open it, read its pieces to the end; then `finish_reason`, `text`, `token_ids` and `logprobs` stand.

    Whatever happens after `open` began, exactly one Final record is logged, and before its ending can be seen.
    """

    def __init__(self, plan: Plan, index: int, parts: Parts) -> None:
        self.index = index
        self.plan = plan
        self.adapter = plan.target.candidates[0]
        self.finish_reason = ""
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ending: Finished | None = None
        self._parts = parts
        self._stream = TextStream(parts.tokenizer, plan.ask.stop)
        self._opened: Opened | None = None
        self._shown: list[str] = []
        self._shown_tokens = 0
        self._first_at = 0.0
        self._last_at = 0.0
        self._longest_gap = 0.0
        self._ended = False

    async def open(self) -> None:
        """Log the request and wait for the engine's first reply, so that a refusal still has a status to answer with.

        Raises WhetError; the failure is logged then.
        """
        self._parts.spool.admit(self.plan.record(self.index))
        self._parts.metrics.running.inc()
        try:
            self._opened = await self._parts.link.open(self.plan.message(self.index), self.plan.target.candidates)
            self.adapter = self._opened.adapter
            _refuse(self._opened.first)
        except BaseException as error:
            self._fail(error)
            raise

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Text as it becomes certain. Once exhausted, the ending is logged. Raises WhetError, logged as well."""
        assert self._opened is not None, "open it first"
        try:
            async with aclosing(self._opened.rest) as rest:
                reply = self._opened.first
                while True:
                    _refuse(reply)
                    text = self._read(reply)
                    if text:
                        yield self._piece(text)
                    if self.ending is not None or self._stream.stopped is not None:
                        break
                    reply = await anext(rest)
            text = self._stream.flush()
            if text or self._unshown():
                yield self._piece(text)
            self._end("stop" if self.ending is None else self.ending.reason)
            await self._parts.spool.durable()
        except EngineGone as error:
            self._fail(error)
            raise gone() from error
        except BaseException as error:
            self._fail(error)
            raise

    async def run(self) -> None:
        """Open it and read it to its end."""
        await self.open()
        async for _ in self.pieces():
            pass

    async def abandon(self) -> None:
        """Cancel and log an opened choice that nobody will read; nothing if it has ended."""
        if self._opened is not None:
            await self._opened.rest.aclose()
            self._fail(GeneratorExit())

    def _read(self, reply: Tokens | PromptLogprobs | Finished) -> str:
        if isinstance(reply, Finished):
            self.ending = reply
            return ""
        if isinstance(reply, PromptLogprobs):
            return ""
        before = self._stream.consumed
        text = self._stream.push(reply.token_ids)
        used = self._stream.consumed - before
        self.token_ids += reply.token_ids[:used]
        self.logprobs += reply.logprobs[:used]
        return text

    def _piece(self, text: str) -> Piece:
        now = time.perf_counter()
        if self._first_at:
            self._longest_gap = max(self._longest_gap, now - self._last_at)
        else:
            self._first_at = now
        self._last_at = now
        self._shown.append(text)
        start, self._shown_tokens = self._shown_tokens, len(self.token_ids)
        if not self.plan.ask.logprobs:
            return Piece(text, [], [])
        return Piece(text, self.token_ids[start:], self.logprobs[start:])

    def _unshown(self) -> bool:
        """Whether log-probabilities are owed for tokens that showed no text."""
        return self.plan.ask.logprobs and self._shown_tokens < len(self.token_ids)

    def _fail(self, error: BaseException) -> None:
        """The choice ends without an answer: because its reader left, or because of `error`."""
        try:
            if isinstance(error, GeneratorExit | asyncio.CancelledError):
                self._end("cancelled")
            else:
                self._end("error", error=error.message if isinstance(error, WhetError) else repr(error))
        except WhetError as failure:
            # Nothing was acknowledged, and the admitted record is there: this becomes "interrupted" at the latest.
            log.error("ending_not_logged", interaction=str(self.plan.ids[self.index]), error=failure.message)

    def _end(self, reason: str, *, error: str | None = None) -> None:
        """Log the ending, once."""
        if self._ended:
            return
        self._ended = True
        self._parts.metrics.running.dec()
        self.finish_reason = reason
        self.text = "".join(self._shown)
        now = time.perf_counter()
        self._parts.spool.finish(self._final(now, error))
        self._measure(now)

    def _final(self, now: float, error: str | None) -> Final:
        logprobs = [round(max(value, LOWEST_LOGPROB), 5) for value in self.logprobs]
        ending = self.ending or NO_ENDING
        return Final(
            id=self.plan.ids[self.index],
            adapter_digest=self.adapter,
            finish_reason=self.finish_reason,
            error=error,
            output=self.text,
            token_ids=self.token_ids,
            token_logprobs=list(logprobs),
            prompt_tokens=len(self.plan.prompt),
            completion_tokens=len(self.token_ids),
            cached_tokens=ending.cached_tokens,
            drafted_tokens=ending.drafted_tokens,
            accepted_tokens=ending.accepted_tokens,
            ttft_ms=self._milliseconds(self._first_at - self.plan.started) if self._first_at else None,
            latency_ms=self._milliseconds(now - self.plan.started),
            longest_gap_ms=self._milliseconds(self._longest_gap) if self._longest_gap else None,
            mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
            min_logprob=min(logprobs, default=None),
            finished_at=time.time(),
        )

    def _milliseconds(self, seconds: float) -> float:
        return round(seconds * 1000, 3)

    def _measure(self, now: float) -> None:
        metrics, model = self._parts.metrics, self.plan.target.project.slug
        metrics.finished.labels(model, self.finish_reason).inc()
        metrics.prompt_tokens.labels(model).inc(len(self.plan.prompt))
        metrics.generation_tokens.labels(model).inc(len(self.token_ids))
        metrics.latency.labels(model).observe(now - self.plan.started)
        if self._first_at:
            metrics.first_token.labels(model).observe(self._first_at - self.plan.started)
        if self._longest_gap:
            metrics.longest_gap.labels(model).observe(self._longest_gap)


def _refuse(reply: Tokens | PromptLogprobs | Finished) -> None:
    """Raise what the caller should hear when the engine ended a request that nobody asked it to end."""
    if isinstance(reply, Finished) and reply.reason in ("error", "cancelled"):
        raise refusal(reply)
