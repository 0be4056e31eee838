"""One choice of one request: run it, turn tokens into text, time it, and log its one ending before anyone sees it."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

import structlog

from engine.client import EngineGone
from engine.messages import Finished, PromptLogprobs, Tokens
from engine.text.tokenizer import Tokenizer
from engine.text.tools import Parsed
from services.errors import DeadlineExceeded, WhetError
from services.gateway import pinned
from services.gateway.engine_link import EngineLink, Opened, Reply, gone, refusal
from services.gateway.log_spool import LogSpool
from services.gateway.metrics import Metrics
from services.gateway.pieces import NOTHING, Call, Piece, Scored, call_parser, text_stream
from services.gateway.planning import Plan
from services.gateway.speculating import Speculating
from services.gateway.spool_format import Final

LOWEST_LOGPROB = -1e4

log = structlog.get_logger()


class Parts(NamedTuple):
    """What a running gateway gives each request."""

    tokenizer: Tokenizer
    link: EngineLink
    spool: LogSpool
    metrics: Metrics


class Choice:
    """Open it, read its pieces to the end; then `finish_reason`, `text` and the rest stand.

    `text` is what the model wrote, and what is logged; `content` and `calls` are what the client sees of it, an echoed
    prompt included. Whatever happens after `open` began, exactly one Final record is logged, and before its ending can
    be seen.
    """

    def __init__(self, plan: Plan, index: int, parts: Parts) -> None:
        self.index = index
        self.plan = plan
        self.planned = plan.choices[index]
        # None made a pinned answer.
        self.adapter = None if plan.pin else plan.target.candidates[0]
        self.finish_reason = ""
        self.text = ""
        self.content = ""
        self.calls: list[Call] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ending: Finished | None = None
        self.cached_tokens = 0
        self.speculating = Speculating()
        self._top: list[list[tuple[int, float]]] = []
        self._echoed = NOTHING
        self._parts = parts
        self._stream = text_stream(plan, self.planned, parts.tokenizer)
        self._parser = call_parser(plan, parts.tokenizer)
        self._opened: Opened | None = None
        self._written: list[str] = []
        self._shown_tokens = 0
        self._first_at = 0.0
        self._last_at = 0.0
        self._longest_gap = 0.0
        self._ended = False

    @property
    def scored(self) -> Scored:
        """Every token shown, an echoed prompt's included."""
        before, own = self._echoed, self._scored(0)
        return Scored(before.token_ids + own.token_ids, before.logprobs + own.logprobs, before.top + own.top)

    async def open(self) -> None:
        """Log the request and wait for the engine's first reply, so that a refusal still has a status to answer with.

        Raises WhetError; the failure is logged then.
        """
        self._parts.spool.admit(self.planned.admitted)
        self._parts.metrics.running.inc()
        try:
            async with asyncio.timeout(self.plan.ask.timeout):
                self._opened = await self._begin()
            self.adapter = self._opened.adapter
            _refuse(self._opened.first)
        except TimeoutError as error:
            late = DeadlineExceeded(f"nothing came within {self.plan.ask.timeout:g} s")
            self._fail(late)
            raise late from error
        except BaseException as error:
            self._fail(error)
            raise

    async def _begin(self) -> Opened:
        if self.plan.pin is not None:
            return pinned.opened(self.plan)
        return await self._parts.link.open(self.plan.message(self.index), self.plan.target.candidates)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Text as it becomes certain. Once exhausted, the ending is logged. Raises WhetError, logged as well."""
        assert self._opened is not None, "open it first"
        ask = self.plan.ask
        try:
            if ask.echo and not ask.logprobs:
                yield self._echo(NOTHING)
            async with aclosing(self._opened.rest) as rest:
                reply = self._opened.first
                while True:
                    _refuse(reply)
                    if piece := self._read(reply):
                        yield piece
                    if self._over:
                        break
                    reply = await anext(rest)
            if piece := self._last_piece():
                yield piece
            self._end(self._reason())
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

    @property
    def _over(self) -> bool:
        done = self._parser is not None and self._parser.done
        return self.ending is not None or self._stream.stopped is not None or done

    def _reason(self) -> str:
        if self.plan.ask.max_tokens == 0:
            return "length"
        return "stop" if self.ending is None else self.ending.reason

    def _read(self, reply: Reply) -> Piece | None:
        if isinstance(reply, Finished):
            self.ending = reply
            self.cached_tokens = reply.cached_tokens
            return None
        if isinstance(reply, PromptLogprobs):
            return self._echo(Scored(self.planned.prompt, [None, *reply.logprobs], [[], *_padded(reply)]))
        # The first tokens say it, since an answer that we end ourselves has no Finished.
        self.cached_tokens = max(self.cached_tokens, reply.cached_tokens)
        if self.plan.ask.max_tokens == 0:
            return None
        before = self._stream.consumed
        text = self._stream.push(reply.token_ids)
        used = self._stream.consumed - before
        self.speculating.add(reply, used)
        self.token_ids += reply.token_ids[:used]
        self.logprobs += reply.logprobs[:used]
        if self.plan.ask.logprobs:
            self._top += _padded(reply)[:used]
        return self._piece(text, Parsed(text, []) if self._parser is None else self._parser.push(text))

    def _last_piece(self) -> Piece | None:
        """What was held back, and log-probabilities still owed for tokens that showed nothing."""
        text = self._stream.flush()
        parsed = Parsed(text, [])
        if self._parser is not None:
            pushed, rest = self._parser.push(text), self._parser.flush()
            parsed = Parsed(pushed.text + rest.text, pushed.calls + rest.calls)
        piece = self._piece(text, parsed)
        if piece is None and self.plan.ask.logprobs and self._shown_tokens < len(self.token_ids):
            return Piece("", self._take_scored())
        return piece

    def _piece(self, text: str, parsed: Parsed) -> Piece | None:
        if text:
            self._clock()
            self._written.append(text)
        if not parsed.text and not parsed.calls:
            return None
        self.content += parsed.text
        for delta in parsed.calls:
            if delta.name is not None:
                self.calls.append(Call(delta.name))
            self.calls[delta.number].arguments += delta.arguments
        return Piece(parsed.text, self._take_scored(), parsed.calls)

    def _echo(self, scored: Scored) -> Piece:
        self._echoed = scored
        self.content += self.planned.text
        return Piece(self.planned.text, scored)

    def _clock(self) -> None:
        now = time.perf_counter()
        if self._first_at:
            self._longest_gap = max(self._longest_gap, now - self._last_at)
        else:
            self._first_at = now
        self._last_at = now

    def _take_scored(self) -> Scored:
        start, self._shown_tokens = self._shown_tokens, len(self.token_ids)
        return self._scored(start) if self.plan.ask.logprobs else NOTHING

    def _scored(self, start: int) -> Scored:
        """Tokens from `start` on. Those that end an answer show nothing, so they are left out."""
        shown = [place for place in range(start, len(self.token_ids)) if self.token_ids[place] not in self._stream.ends]
        return Scored(
            [self.token_ids[place] for place in shown],
            [self.logprobs[place] for place in shown],
            [self._top[place] for place in shown],
        )

    def _fail(self, error: BaseException) -> None:
        """The choice ends without an answer: because its reader left, or because of `error`."""
        try:
            if isinstance(error, GeneratorExit | asyncio.CancelledError):
                self._end("cancelled")
            else:
                self._end("error", error=error.message if isinstance(error, WhetError) else repr(error))
        except WhetError as failure:
            # Nothing was acknowledged, and the admitted record is there: this becomes "interrupted" at the latest.
            log.error("ending_not_logged", interaction=str(self.planned.id), error=failure.message)

    def _end(self, reason: str, *, error: str | None = None) -> None:
        """Log the ending, once."""
        if self._ended:
            return
        self._ended = True
        self._parts.metrics.running.dec()
        self.finish_reason = reason
        self.text = "".join(self._written)
        now = time.perf_counter()
        self._parts.spool.finish(self._final(now, error))
        self._measure(now)

    def _final(self, now: float, error: str | None) -> Final:
        logprobs = [round(max(value, LOWEST_LOGPROB), 5) for value in self.logprobs]
        speculating = self.speculating
        return Final(
            id=self.planned.id,
            adapter_digest=self.adapter,
            finish_reason=self.finish_reason,
            error=error,
            output=self.text,
            token_ids=self.token_ids,
            token_logprobs=list(logprobs),
            prompt_tokens=len(self.planned.prompt),
            completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens,
            drafted_tokens=speculating.drafted_tokens,
            accepted_tokens=speculating.accepted_tokens,
            speculated=self.planned.speculate,
            speculation=speculating.document(),
            speculator_digest=speculating.speculator,
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
        metrics, model, ending = self._parts.metrics, self.plan.target.project.slug, self.ending
        metrics.finished.labels(model, self.finish_reason).inc()
        metrics.prompt_tokens.labels(model).inc(len(self.planned.prompt))
        metrics.generation_tokens.labels(model).inc(len(self.token_ids))
        metrics.latency.labels(model).observe(now - self.plan.started)
        if self.plan.pin is not None:
            # The engine was not asked: what follows is about what it does.
            metrics.pinned.labels(model).inc()
            return
        metrics.speculation.count(model, self.speculating)
        if ending is not None or self.token_ids:
            metrics.prefix_queries.labels(model).inc(len(self.planned.prompt))
            metrics.prefix_hits.labels(model).inc(self.cached_tokens)
        if ending is not None:
            metrics.queued.labels(model).observe(ending.queue_seconds)
        if self._first_at:
            metrics.first_token.labels(model).observe(self._first_at - self.plan.started)
        if len(self.token_ids) > 1:
            seconds = (self._last_at - self._first_at) / (len(self.token_ids) - 1)
            metrics.token_time.labels(model).observe(seconds)
        if self._longest_gap:
            metrics.longest_gap.labels(model).observe(self._longest_gap)


def _padded(reply: Tokens | PromptLogprobs) -> list[list[tuple[int, float]]]:
    """An engine asked for no likeliest tokens sends none, not an empty list for each token."""
    return reply.top or [[] for _ in reply.logprobs]


def _refuse(reply: Reply) -> None:
    """Raise what the caller should hear when the engine ended a request that nobody asked it to end."""
    if isinstance(reply, Finished) and reply.reason in ("error", "cancelled"):
        raise refusal(reply)
