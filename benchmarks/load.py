"""Load on a server that streams OpenAI completions, and what its users would see.

    python -m benchmarks.load --url http://127.0.0.1:8000 --model M --words DIR/words.json --shape 350/50 -c 16 -n 64
    python -m benchmarks.load … --qps 4 -n 100

A closed loop keeps `c` requests in flight; an open one sends at Poisson arrivals. The client shares the processors
with the server it measures, so it does little: one protocol object per request on uvloop's sockets, no HTTP library,
and JSON is parsed once per answer, for its usage. Its own processor time is part of every result: 12 µs a token with 16
requests in flight, where one of them alone pays 36 for the wake-ups.
"""

import argparse
import asyncio
import gc
import json
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.shapes import make_prompts, parse_shape

T = TypeVar("T")
PATH = "/v1/completions"
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Target:
    """Where requests go. `extra` joins every body; `key` is sent as a bearer token."""

    url: str
    model: str
    key: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def request(self, prompt: str, tokens: int) -> bytes:
        """One greedy streaming request, ready for the socket."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **self.extra,
        }  # fmt: skip
        payload = json.dumps(body).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(payload)}\r\n"
        head += f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        return head.encode() + b"\r\n" + payload


@dataclass
class Answer:
    """What came back, in seconds of one clock. `arrivals` has one entry for each event that carried text."""

    began: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str = ""

    @property
    def tokens(self) -> int:
        """What the server says it generated, else the events that carried text."""
        return len(self.arrivals) if self.completion_tokens is None else self.completion_tokens


@dataclass(frozen=True)
class Run:
    """All answers of one measurement, its length, and the processor time the client took for it (seconds)."""

    answers: list[Answer]
    seconds: float
    client_seconds: float


class Stream(asyncio.Protocol):
    """One request and its server-sent events, read as they come; `finished` holds the answer at the end."""

    def __init__(self, request: bytes) -> None:
        self.finished: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._request = request
        self._answer = Answer(began=time.perf_counter())
        self._raw = b""
        self._text = b""
        self._chunked: bool | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._raw += data
        if self._chunked is None and not self._read_head():
            return
        self._unwrap()
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def connection_lost(self, exc: Exception | None) -> None:
        # Some servers end after the usage, without [DONE].
        whole = exc is None and self._answer.completion_tokens is not None and self._answer.arrivals
        rest = (self._text or self._raw)[:300].decode(errors="replace")
        self._end("" if whole else f"the connection ended early: {exc or rest!r}")

    def abandon(self) -> None:
        """Close the connection of a request nobody waits for any more."""
        if self._transport is not None:
            self._transport.abort()

    def _read_head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if found:
            self._chunked, self._raw = b"transfer-encoding: chunked" in head.lower(), rest
            status = head.split(b" ", 2)[1]
            if status != b"200":
                self._end(f"HTTP {status.decode()}: {rest[:300].decode(errors='replace')}")
        return bool(found)

    def _unwrap(self) -> None:
        """Move whole chunks from the raw bytes to the text; without chunks everything is text."""
        if not self._chunked:
            self._text, self._raw = self._text + self._raw, b""
            return
        while (end := self._raw.find(b"\r\n")) > 0:
            size = int(self._raw[:end].split(b";")[0], 16)
            if len(self._raw) < end + size + 4:
                return
            self._text += self._raw[end + 2 : end + 2 + size]
            self._raw = self._raw[end + size + 4 :]

    def _event(self, payload: bytes, now: float) -> None:
        self._answer.ended = now
        if payload == b"[DONE]":
            self._end("" if self._answer.arrivals else "an answer without text")
            return
        if payload.startswith(b'{"error"'):
            self._end(payload[:300].decode(errors="replace"))
            return
        if has_text(payload):
            self._answer.arrivals.append(now)
        if b'"usage":{' in payload or b'"usage": {' in payload:
            usage = json.loads(payload)["usage"]
            self._answer.prompt_tokens = usage["prompt_tokens"]
            self._answer.completion_tokens = usage["completion_tokens"]

    def _end(self, error: str) -> None:
        if self.finished.done():
            return
        self._answer.error = error
        self.finished.set_result(self._answer)
        self.abandon()


def has_text(payload: bytes) -> bool:
    """Whether an event's `text` (or a chat delta's `content`) is a string that is not empty, without parsing it."""
    for name in (b'"text":', b'"content":'):
        at = payload.find(name)
        if at >= 0:
            value = payload[at + len(name) : at + len(name) + 3].lstrip()
            return value.startswith(b'"') and not value.startswith(b'""')
    return False


async def ask(target: Target, prompt: str, tokens: int) -> Answer:
    """One request from its connection to its last event; a failure is an answer with its error."""
    stream = Stream(target.request(prompt, tokens))
    address = urlsplit(target.url)
    try:
        await asyncio.get_running_loop().create_connection(lambda: stream, address.hostname or "", address.port or 80)
        return await asyncio.wait_for(asyncio.shield(stream.finished), TIMEOUT_SECONDS)
    except (OSError, TimeoutError) as error:
        stream.abandon()
        return Answer(began=time.perf_counter(), error=f"{type(error).__name__}: {error}")


async def closed_loop(target: Target, prompts: Sequence[str], tokens: int, concurrency: int) -> Run:
    """All prompts, never more than `concurrency` in flight, the next as soon as one ends."""
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def user() -> None:
        for prompt in waiting:
            answers.append(await ask(target, prompt, tokens))

    async def everybody() -> list[Answer]:
        await asyncio.gather(*(user() for _ in range(concurrency)))
        return answers

    return await _timed(everybody())


async def poisson(target: Target, prompts: Sequence[str], tokens: int, rate: float, seed: int) -> Run:
    """All prompts at exponentially distributed distances, on average `rate` a second, however many are in flight."""
    draw = random.Random(seed)

    async def everybody() -> list[Answer]:
        due = time.perf_counter()
        tasks = []
        for prompt in prompts:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(target, prompt, tokens)))
            due += draw.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    return await _timed(everybody())


async def _timed(everybody: Coroutine[Any, Any, list[Answer]]) -> Run:
    began, spent = time.perf_counter(), time.process_time()
    answers = await everybody
    return Run(answers, time.perf_counter() - began, time.process_time() - spent)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a measurement on uvloop, without pauses of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(work)
    finally:
        gc.enable()


def summary(measured: Run) -> dict[str, Any]:
    """Rates a second and quantiles in milliseconds. Raises RuntimeError when no request was answered."""
    answers = [answer for answer in measured.answers if not answer.error]
    errors = sorted({answer.error for answer in measured.answers if answer.error})
    if not answers:
        raise RuntimeError(f"no request was answered: {errors[:2]}")
    generated = sum(answer.tokens for answer in answers)
    gaps = [after - before for a in answers for before, after in zip(a.arrivals, a.arrivals[1:], strict=False)]
    return {
        "requests": len(measured.answers),
        "failed": len(measured.answers) - len(answers),
        "errors": errors[:2],
        "seconds": round(measured.seconds, 3),
        "tokens_per_request": sorted({answer.tokens for answer in answers}),
        "prompt_tokens": sorted({answer.prompt_tokens for answer in answers if answer.prompt_tokens})[:4],
        "tokens_per_second": round(generated / measured.seconds, 2),
        "requests_per_second": round(len(answers) / measured.seconds, 3),
        "ttft_ms": quantiles([answer.arrivals[0] - answer.began for answer in answers]),
        "inter_token_ms": quantiles(gaps),
        "end_to_end_ms": quantiles([answer.ended - answer.began for answer in answers]),
        "client_us_per_token": round(1e6 * measured.client_seconds / generated, 1),
        "client_share": round(measured.client_seconds / measured.seconds, 4),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds, linear between neighbours; empty when there is nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {name: round(1e3 * quantile(ordered, q), 3) for name, q in (("p50", 0.5), ("p95", 0.95))}


def quantile(ordered: Sequence[float], q: float) -> float:
    """The value below which the share `q` of sorted values lies, linear between neighbours."""
    place = (len(ordered) - 1) * q
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def main() -> None:
    """Measure one cell and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--words", type=Path, required=True, help="JSON list of one-token strings")
    parser.add_argument("--shape", type=parse_shape, default=(120, 25), help="prompt/answer tokens")
    parser.add_argument("-c", "--concurrency", type=int, default=1)
    parser.add_argument("-n", "--requests", type=int, default=16)
    parser.add_argument("--qps", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON object merged into every body")
    options = parser.parse_args()
    target = Target(options.url, options.model, options.key, options.extra)
    length, tokens = options.shape
    prompts = make_prompts(json.loads(options.words.read_text()), length, options.requests, options.seed)
    if options.qps:
        print(json.dumps(summary(run(poisson(target, prompts, tokens, options.qps, options.seed)))))
    else:
        print(json.dumps(summary(run(closed_loop(target, prompts, tokens, options.concurrency)))))


if __name__ == "__main__":
    main()
