"""The engine's process over real ZeroMQ, through both clients."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
import zmq

from engine.client import EngineClient, EngineGone, EngineRefused
from engine.digest import base_digest
from engine.messages import Cancel, Done, Finished, Forget, Generate, Sampling, Tokens, decode_from_engine, encode
from engine.sync_client import SyncEngineClient
from tests.engine.conftest import peft_model, write_artifact
from tests.engine.serving import Served, served

LONG = 480


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def digests(model_dir: Path, root: Path) -> list[str]:
    """Two adapters the engine may load."""
    base = base_digest(model_dir)
    return [write_artifact(root, base, peft_model(model_dir, seed, 4, ["q_proj", "down_proj"])) for seed in (1, 2)]


@pytest.fixture(scope="module")
def server(model_dir: Path, root: Path) -> Iterator[Served]:
    with served(model_dir, root) as engine:
        yield engine


def generate(name: str, tokens: int = 8, adapter: str | None = None, prompt: list[int] | None = None) -> Generate:
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=tokens)
    return Generate(id=name, prompt=prompt or [5, 6, 7], sampling=sampling, adapter=adapter)


def on_loop(address: str, body: Callable[[EngineClient], AsyncIterator[None]]) -> None:
    """Run an async test body with a client, bounded in time."""

    async def run() -> None:
        async with asyncio.timeout(60), EngineClient(address) as client:
            await body(client)

    asyncio.run(run())


async def settled(client: EngineClient) -> None:
    """Wait until the engine holds nothing for anybody."""
    for _ in range(200):
        status = await client.status()
        if not status.running and not status.waiting:
            assert status.blocks_free == status.blocks_total
            assert all(slot.references == 0 for slot in status.slots)
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the engine still holds requests")


def test_the_ready_line_says_what_runs(server: Served, model_dir: Path) -> None:
    assert server.ready["event"] == "engine_ready"
    assert server.ready["base"] == base_digest(model_dir)
    assert server.ready["seconds"] > 0
    assert server.ready["pid"] == server.process.pid


def test_tokens_arrive_in_order_and_end_once(server: Served) -> None:
    async def body(client: EngineClient) -> None:
        replies = [reply async for reply in client.generate(generate("one"))]
        # Tokens that queued up while the reader was busy arrive joined.
        assert all(isinstance(reply, Tokens) for reply in replies[:-1])
        assert sum(len(reply.token_ids) for reply in replies[:-1]) == 8
        assert (replies[-1].reason, replies[-1].completion_tokens, replies[-1].prompt_tokens) == ("length", 8, 3)
        assert 0 <= replies[-1].queue_seconds <= replies[-1].first_token_seconds <= replies[-1].total_seconds

    on_loop(server.address, body)


def test_closing_the_stream_cancels_the_request(server: Served) -> None:
    async def body(client: EngineClient) -> None:
        before = (await client.status()).generated_tokens
        async with aclosing(client.generate(generate("left", LONG))) as stream:
            async for _ in stream:
                break
        await settled(client)
        assert (await client.status()).generated_tokens < before + LONG

    on_loop(server.address, body)


def test_a_client_that_vanishes_has_its_requests_cancelled(server: Served) -> None:
    async def body(client: EngineClient) -> None:
        before = (await client.status()).generated_tokens
        context = zmq.Context()
        other = context.socket(zmq.DEALER)
        other.connect(server.address)
        other.send(encode(generate("orphan", LONG)))
        assert other.poll(5000)
        other.close(linger=0)
        context.term()
        await settled(client)
        assert (await client.status()).generated_tokens < before + LONG

    on_loop(server.address, body)


def test_refusals_come_as_finished_with_a_code(server: Served) -> None:
    async def body(client: EngineClient) -> None:
        too_long = await client.complete(generate("long", prompt=[5] * 600))
        unknown = await client.complete(generate("unknown", adapter="0" * 64))
        assert (too_long.finished.code, unknown.finished.code) == ("prompt_too_long", "adapter_not_loaded")
        with pytest.raises(EngineRefused, match="no artefact directory"):
            await client.load_adapter("0" * 64, "0" * 64)
        await client.forget("anything")

    on_loop(server.address, body)


def test_swapping_adapters_does_not_disturb_running_streams(server: Served, digests: list[str]) -> None:
    old, new = digests

    async def body(client: EngineClient) -> None:
        await client.load_adapter(old, old)
        expected = (await client.complete(generate("before", 60, old))).token_ids
        streams = [asyncio.create_task(client.complete(generate(f"s{n}", 60, old))) for n in range(6)]
        await asyncio.sleep(0.01)
        await client.load_adapter(new, new)
        swapped = asyncio.create_task(client.complete(generate("after", 60, new)))
        await client.unload_adapter(old)
        finished = await asyncio.gather(*streams)
        assert all(done.token_ids == expected and done.finished.adapter == old for done in finished)
        assert (await swapped).token_ids != expected
        assert (await client.complete(generate("late", adapter=old))).finished.code == "adapter_not_loaded"
        assert [slot.digest for slot in (await client.status()).slots] == [new]
        await client.unload_adapter(new)
        await settled(client)

    on_loop(server.address, body)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1garbage",
        b"\x82\xa4type\xa6cancel\xa2id\xa2\xff\xfe",
        msgspec.msgpack.encode({"type": [], "id": "x"}),
        msgspec.msgpack.encode({"type": {"load_adapter": 1}, "id": 7}),
        msgspec.msgpack.encode({"type": "generate", "id": "bad", "prompt": "text"}),
        msgspec.msgpack.encode({"type": "no such thing", "id": "bad"}),
        msgspec.msgpack.encode({"type": "load_adapter", "id": "bad"}),
        msgspec.msgpack.encode([1, 2, 3]),
        b"\x91" * 5000,
    ],
)
def test_a_malformed_message_is_answered_and_harms_nobody(frame: bytes, server: Served) -> None:
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(server.address)
    raw.send(frame)
    assert raw.poll(10_000), "no answer"
    answer = decode_from_engine(raw.recv())
    raw.close(linger=0)
    context.term()
    assert isinstance(answer, Finished | Done)
    assert answer.error
    with SyncEngineClient(server.address) as client:
        assert client.generate(generate("fine")).finished.reason == "length"


def test_a_repeated_id_is_refused_before_it_is_sent(server: Served) -> None:
    async def body(client: EngineClient) -> None:
        async with aclosing(client.generate(generate("twice", LONG))) as stream:
            async for _ in stream:
                with pytest.raises(ValueError, match="already in flight"):
                    await client.complete(generate("twice"))
                break
        await settled(client)

    on_loop(server.address, body)


def test_cancelling_an_unknown_id_is_ignored(server: Served) -> None:
    async def body(client: EngineClient) -> None:
        await client._socket.send(encode(Cancel(id="never seen")))
        await client._socket.send(encode(Forget(id="f", namespace="n")))
        assert (await client.complete(generate("fine"))).finished.reason == "length"

    on_loop(server.address, body)


def test_the_sync_client_keeps_order_and_survives_a_pause(server: Served) -> None:
    with SyncEngineClient(server.address) as client:
        asked = [generate(f"m{size}", size) for size in range(1, 30)]
        done = client.generate_many(asked, concurrency=7)
        assert [len(completion.token_ids) for completion in done] == list(range(1, 30))
        assert all(len(completion.logprobs) == len(completion.token_ids) for completion in done)
        time.sleep(1.2)
        assert client.status().running == 0


def test_a_killed_engine_fails_what_was_in_flight_and_its_successor_serves(model_dir: Path, root: Path) -> None:
    with served(model_dir, root) as engine:

        async def body(client: EngineClient) -> None:
            first = client.epoch or (await client.status()).epoch
            stream = client.generate(generate("doomed", LONG))
            await anext(stream)
            command = asyncio.create_task(client.load_adapter("0" * 64, "0" * 64))
            os.kill(engine.process.pid, signal.SIGSTOP)
            waiting = asyncio.create_task(client.status())
            await asyncio.sleep(0.05)
            engine.process.kill()
            began = time.monotonic()
            with pytest.raises(EngineGone):
                async for _ in stream:
                    pass
            with pytest.raises(EngineGone):
                await waiting
            await asyncio.gather(command, return_exceptions=True)
            with pytest.raises(EngineGone, match="no engine answers"):
                await client.complete(generate("nobody there"))
            assert time.monotonic() - began < 4
            await asyncio.to_thread(engine.restart)
            while not client.connected:
                await asyncio.sleep(0.02)
            assert (await client.complete(generate("doomed"))).finished.reason == "length"
            assert client.epoch != first

        on_loop(engine.address, body)


def test_an_engine_that_stops_answering_is_given_up(model_dir: Path, root: Path) -> None:
    async def body(address: str, pid: int) -> None:
        async with EngineClient(address, silence_seconds=1.0) as client:
            await client.status()
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(EngineGone, match="stopped answering"):
                await client.complete(generate("frozen"))
            os.kill(pid, signal.SIGCONT)

    with served(model_dir, root) as engine:
        asyncio.run(asyncio.wait_for(body(engine.address, engine.process.pid), 30))


def test_sigterm_ends_the_process_cleanly(model_dir: Path, root: Path) -> None:
    with served(model_dir, root) as engine:
        engine.process.send_signal(signal.SIGTERM)
        output, _ = engine.process.communicate(timeout=20)
        assert engine.process.returncode == 0
        assert "engine_stopped" in output


def test_an_idle_engine_does_not_spin(server: Served) -> None:
    def cpu_seconds() -> float:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = cpu_seconds()
    time.sleep(1.0)
    assert cpu_seconds() - before < 0.1
