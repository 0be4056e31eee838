"""The load generator's figures, on a server whose timing and token counts are known."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from benchmarks.load import Answer, Run, Target, closed_loop, has_text, poisson, quantile, run, summary
from benchmarks.shapes import make_prompts

FIRST_SECONDS, GAP_SECONDS, TOKENS = 0.06, 0.02, 5
Reply = Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}], "usage": None}).encode() + b"\n\n"


def usage(completion: int) -> bytes:
    counts = {"prompt_tokens": 7, "completion_tokens": completion}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def steady(writer: asyncio.StreamWriter) -> None:
    """Five tokens at a known pace; every chunk is cut in two, as networks do."""
    await asyncio.sleep(FIRST_SECONDS)
    for index in range(TOKENS):
        data = (HEAD if index == 0 else b"") + chunk(event(f' "text":"" {index}'))
        writer.write(data[:-9])
        await asyncio.sleep(0)
        writer.write(data[-9:])
        await asyncio.sleep(GAP_SECONDS if index < TOKENS - 1 else 0)
    writer.write(chunk(event("")) + chunk(usage(TOKENS)) + chunk(b"data: [DONE]\n\n") + chunk(b""))


async def without_done(writer: asyncio.StreamWriter) -> None:
    """An answer that ends with its usage and a closed connection, and is not chunked."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + event("one two") + usage(2))


async def cut(writer: asyncio.StreamWriter) -> None:
    """A server that dies in the middle."""
    writer.write(HEAD + chunk(event("one")))


async def busy(writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 16\r\n\r\n{"error":"later"}')


def measure(reply: Reply, work: Callable[[Target], Coroutine[Any, Any, Run]]) -> tuple[Run, int]:
    """What the client measured on a server that replies so, and the most requests that were in flight at once."""
    flying, most = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        assert json.loads(body)["stream"] is True
        await reply(writer)
        flying -= 1
        await writer.drain()
        writer.close()

    async def whole() -> Run:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await work(Target(f"http://127.0.0.1:{port}", "model"))

    return run(whole()), most


def test_times_and_counts_are_those_of_the_server() -> None:
    measured, most = measure(steady, lambda target: closed_loop(target, ["a"] * 6, TOKENS, 3))

    figures = summary(measured)

    assert most == 3
    assert (figures["requests"], figures["failed"], figures["tokens_per_request"]) == (6, 0, [TOKENS])
    assert figures["prompt_tokens"] == [7]
    assert 1e3 * FIRST_SECONDS - 1 <= figures["ttft_ms"]["p50"] < 1e3 * FIRST_SECONDS + 400
    assert 1e3 * GAP_SECONDS - 5 <= figures["inter_token_ms"]["p50"] < 1e3 * GAP_SECONDS + 200
    assert all(len(answer.arrivals) == TOKENS for answer in measured.answers)
    two_waves = 2 * (FIRST_SECONDS + (TOKENS - 1) * GAP_SECONDS)
    assert 0.2 * 6 * TOKENS / two_waves < figures["tokens_per_second"] <= 1.05 * 6 * TOKENS / two_waves


def test_an_answer_without_done_counts_when_its_usage_came() -> None:
    measured, _ = measure(without_done, lambda target: closed_loop(target, ["a"], 2, 1))
    assert summary(measured)["tokens_per_request"] == [2]
    assert len(measured.answers[0].arrivals) == 1


@pytest.mark.parametrize(("reply", "words"), [(cut, "ended early"), (busy, "HTTP 429")])
def test_a_broken_answer_is_a_failure_never_a_figure(reply: Reply, words: str) -> None:
    measured, _ = measure(reply, lambda target: closed_loop(target, ["a", "b"], 2, 1))
    assert all(words in answer.error for answer in measured.answers)
    with pytest.raises(RuntimeError, match="no request was answered"):
        summary(measured)


def test_poisson_arrivals_do_not_wait_for_answers_and_repeat_for_a_seed() -> None:
    measured, most = measure(steady, lambda target: poisson(target, ["a"] * 20, TOKENS, 200.0, seed=1))
    again, _ = measure(steady, lambda target: poisson(target, ["a"] * 20, TOKENS, 200.0, seed=1))

    began, began_again = ([answer.began - run.answers[0].began for answer in run.answers] for run in (measured, again))

    assert most > 5
    assert began == pytest.approx(began_again, abs=0.05)


def test_quantiles_are_linear_between_neighbours() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.95) == pytest.approx(4.8)
    assert quantile([7.0], 0.95) == 7.0


def test_gaps_are_taken_inside_answers_only() -> None:
    answers = [Answer(0.0, 3.0, [1.0, 2.0]), Answer(10.0, 13.5, [11.0, 13.0])]
    figures = summary(Run(answers, seconds=2.0, client_seconds=0.001))
    assert figures["inter_token_ms"] == {"p50": 1500.0, "p95": 1950.0}
    assert figures["end_to_end_ms"]["p50"] == 3250.0
    assert figures["tokens_per_second"] == 2.0
    assert figures["client_us_per_token"] == 250.0


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"choices":[{"text":"a"}]}', True),
        (b'{"choices":[{"text": "a"}]}', True),
        (b'{"choices":[{"text":""}]}', False),
        (b'{"choices":[{"delta":{"content":null}}]}', False),
        (b'{"choices":[{"delta":{"role":"assistant","content":"x"}}]}', True),
        (b'{"choices":[],"usage":{}}', False),
    ],
)
def test_only_events_with_visible_text_are_arrivals(payload: bytes, expected: bool) -> None:
    assert has_text(payload) is expected


def test_prompts_repeat_for_a_seed_and_differ_from_each_other() -> None:
    words = [f" w{index}" for index in range(50)]
    prompts = make_prompts(words, 30, 8, "seed")
    assert prompts == make_prompts(words, 30, 8, "seed")
    assert prompts != make_prompts(words, 30, 8, "other")
    assert len({prompt[:12] for prompt in prompts}) == 8
    assert all(len(prompt.split()) == 30 for prompt in prompts)
