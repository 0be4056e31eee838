"""What the gateway and its log cost, over an engine that computes nothing.

`python -m benchmarks.gateway [--seconds 10]` starts a Postgres, the fake engine, the gateway and the shipper, and
prints one JSON object: spool appends a second, HTTP requests a second (each logged twice and shipped), the time a token
spends between leaving the engine and reaching the client, and the processor time the gateway takes for each.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select

from engine.client import EngineClient
from engine.messages import Generate, Sampling
from engine.text.tokenizer import Tokenizer
from migrations.run import upgrade
from services.gateway.log_spool import LogSpool
from services.gateway.spool_format import frame
from services.platform.accounts import server_account
from services.platform.paths import prepare_home, temporary_home
from services.platform.postgres import PostgresServer
from services.platform.process import Guarded
from services.store import partitions
from services.store.base import make_sessions, uuid7
from services.store.models import Interaction
from tests.gateway.parts import TEMPLATE, World, make_world
from tests.gateway.test_spool import admitted, final

CONCURRENCY = 16
TOKENS = 50
STEP_MS = 5.0
CONTENT = "Anna Berg met the council of Oslo on 3 May. " * 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    seconds = parser.parse_args().seconds
    with database() as postgres:
        report = {
            "command": f"python -m benchmarks.gateway --seconds {seconds:g}",
            "cpus": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2),
            "spool": measure_spool(seconds / 2),
            "http": measure_requests(postgres, seconds),
            "token_latency": measure_tokens(postgres, seconds),
            "share_of_engine": measure_share(postgres, seconds),
        }
    print(json.dumps(report, indent=1))


@contextmanager
def database() -> Iterator[PostgresServer]:
    """A throw-away Postgres with durable commits, and the migrated template that worlds copy."""
    with temporary_home("whet-bench-") as home:
        prepare_home(home, home / "run", server_account())
        server = PostgresServer(home / "postgres", home / "run", server_account())
        running = Guarded(server.part(), home / "logs" / "postgres.log")
        try:
            running.wait_ready()
            url = server.create_database(TEMPLATE)
            upgrade(url)
            sessions = make_sessions(url)
            with sessions.begin() as session:
                partitions.ensure(session)
            sessions.kw["bind"].dispose()
            yield server
        finally:
            running.stop()


def measure_spool(seconds: float) -> dict[str, Any]:
    """Appends from one thread while the other syncs every 50 ms."""
    record = admitted("x" * 700)
    ending = final(record)
    took: list[float] = []
    with tempfile.TemporaryDirectory(prefix="whet-bench-") as directory:
        spool = LogSpool(Path(directory), budget_bytes=1 << 40)
        start = time.perf_counter()
        while (now := time.perf_counter()) - start < seconds:
            spool.admit(record)
            spool.finish(ending)
            took.append(time.perf_counter() - now)
        elapsed = time.perf_counter() - start
        spool.close()
    took.sort()
    return {
        "record_bytes": len(frame(record)) + len(frame(ending)),
        "interactions_per_second": round(len(took) / elapsed),
        "append_us": {name: round(quantile(took, q) * 1e6 / 2, 1) for name, q in (("p50", 0.5), ("p99", 0.99))},
    }


def measure_requests(postgres: PostgresServer, seconds: float) -> dict[str, Any]:
    """Whole answers of one token, closed loop; then how long the log takes to be complete in Postgres."""
    with make_world(postgres, step_ms=0) as world:
        gateway = start_all(world)
        spent = cpu_seconds(gateway)
        answered = asyncio.run(closed_loop(world, seconds, {"max_tokens": 1}))
        spent = cpu_seconds(gateway) - spent
        stopped = time.monotonic()
        while landed(world) < len(answered):
            time.sleep(0.02)
        drained = time.monotonic() - stopped
    return {
        "concurrency": CONCURRENCY,
        "requests_per_second": round(len(answered) / seconds, 1),
        "latency_ms": milliseconds(answered),
        "gateway_cpu_ms_per_request": round(spent / len(answered) * 1000, 3),
        "log_complete_after_seconds": round(drained, 2),
    }


def measure_tokens(postgres: PostgresServer, seconds: float) -> dict[str, Any]:
    """Streams at a steady pace; the fake engine stamps each token with its own clock, in the log-probability."""
    with make_world(postgres, step_ms=STEP_MS) as world:
        gateway = start_all(world, "--stamp")
        spent = cpu_seconds(gateway)
        body = {"max_tokens": TOKENS, "stream": True, "logprobs": True}
        late = asyncio.run(closed_loop(world, seconds, body))
        spent = cpu_seconds(gateway) - spent
    return {
        "concurrency": CONCURRENCY,
        "engine_step_ms": STEP_MS,
        "tokens_per_second": round(len(late) / seconds),
        "engine_to_client_ms": milliseconds(late),
        "gateway_cpu_us_per_token": round(spent / len(late) * 1e6, 1),
    }


def measure_share(postgres: PostgresServer, seconds: float) -> dict[str, Any]:
    """The starter model at full speed: asked over the engine's socket, then through the gateway with its log."""
    with make_world(postgres, real_engine=True, WHET_MODEL="starter", WHET_PRECISION="auto") as world:
        gateway = start_all(world)
        alone = asyncio.run(engine_alone(world, seconds))
        spent = cpu_seconds(gateway)
        body = {"max_tokens": TOKENS, "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
        through = asyncio.run(closed_loop(world, seconds, body))
        spent = cpu_seconds(gateway) - spent
    return {
        "concurrency": CONCURRENCY,
        "engine_tokens_per_second": round(alone),
        "gateway_tokens_per_second": round(len(through) / seconds),
        "share": round(len(through) / seconds / alone, 3),
        "gateway_cpu_us_per_token": round(spent / len(through) * 1e6, 1),
    }


async def engine_alone(world: World, seconds: float) -> float:
    """Tokens a second over the engine's own socket, with the gateway's prompt and no sampling differences."""
    tokenizer = Tokenizer.load(world.settings.model_path)
    prompt = tokenizer.encode_chat([{"role": "user", "content": CONTENT}])
    until = time.monotonic() + seconds
    counts: list[int] = []

    async def one(client: EngineClient) -> None:
        while time.monotonic() < until:
            sampling = Sampling(seed=len(counts), max_tokens=TOKENS)
            done = await client.complete(Generate(id=uuid7().hex, prompt=prompt, sampling=sampling))
            counts.append(len(done.token_ids))

    async with EngineClient(world.settings.engine_socket) as client:
        await asyncio.gather(*(one(client) for _ in range(CONCURRENCY)))
    return sum(counts) / seconds


def start_all(world: World, *engine_options: str) -> psutil.Process:
    """Everything up; returns the gateway's process."""
    world.start_engine(*engine_options)
    world.start_shipper()
    return psutil.Process(world.start_gateway().pid)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def landed(world: World) -> int:
    with world.sessions.begin() as session:
        return session.scalar(select(func.count()).select_from(Interaction)) or 0


async def closed_loop(world: World, seconds: float, fields: dict[str, Any]) -> list[float]:
    """Seconds each request took, or of a stream, seconds each token was on its way."""
    body = {"model": "entities", "messages": [{"role": "user", "content": CONTENT}], **fields}
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {world.keys['app']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    request = head.encode() + payload
    until = time.monotonic() + seconds
    results = await asyncio.gather(
        *(one_client(world.settings.gateway_port, request, until) for _ in range(CONCURRENCY))
    )
    return sorted(value for values in results for value in values)


async def one_client(port: int, request: bytes, until: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    seen: list[float] = []
    while time.monotonic() < until:
        start = time.monotonic()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise RuntimeError(head.decode())
        if b"transfer-encoding: chunked" in head:
            await read_stream(reader, seen)
        else:
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            seen.append(time.monotonic() - start)
    writer.close()
    await writer.wait_closed()
    return seen


async def read_stream(reader: asyncio.StreamReader, seen: list[float]) -> None:
    """Chunks to the end: every token the engine stamped adds its delay; without stamps the usage counts the tokens."""
    while size := int(await reader.readline(), 16):
        data = await reader.readexactly(size + 2)
        now = time.monotonic()
        # A chunk may hold several tokens when the reader is slow.
        _, *stamped = data.split(b'"logprob":')
        seen += [now - float(rest[: rest.index(b",")]) for rest in stamped]
        _, _, counted = data.partition(b'"completion_tokens":')
        if counted:
            seen += [now] * int(counted[: counted.index(b",")])
    await reader.readline()


def milliseconds(values: list[float]) -> dict[str, float]:
    """Quantiles of sorted seconds."""
    return {name: round(quantile(values, q) * 1000, 3) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}


def quantile(values: list[float], q: float) -> float:
    return values[min(len(values) - 1, int(len(values) * q))]


if __name__ == "__main__":
    main()
