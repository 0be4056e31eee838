"""The engine dies: what was in flight gets an error at once, new requests a 503, and all goes on when it is back."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from services.platform.postgres import PostgresServer
from tests.gateway.parts import Process, World, eventually, make_world

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "entities", "messages": HELLO, "max_tokens": 3}


@pytest.fixture(scope="module")
def slow_world(postgres: PostgresServer) -> Iterator[World]:
    """A gateway whose engine takes its time over each token."""
    with make_world(postgres, step_ms=20) as world:
        world.start_engine()
        world.start_shipper()
        world.start_gateway()
        yield world


def living_engine(world: World) -> Process:
    return next(process for process in world.processes if process.alive and process.log.name == "fake_engine.log")


def bring_back(world: World) -> None:
    world.start_engine()
    eventually(lambda: world.post("/v1/chat/completions", CHAT).status_code == 200)


def test_an_engine_killed_mid_stream_fails_the_stream_and_returns(slow_world: World) -> None:
    stream = slow_world.openai().chat.completions.create(model="entities", messages=HELLO, max_tokens=400, stream=True)
    chunks = [next(stream) for _ in range(4)]
    living_engine(slow_world).kill()
    killed = time.monotonic()
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)
    assert time.monotonic() - killed < 2
    refused = slow_world.post("/v1/chat/completions", CHAT)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert refused.headers["retry-after"] == "1"

    bring_back(slow_world)
    row = slow_world.interaction(chunks[0].id).interaction
    assert row.finish_reason == "error"
    assert row.error is not None
    assert 0 < row.completion_tokens < 400


def test_a_mute_engine_degrades_health_and_does_not_hold_up_the_metrics(slow_world: World) -> None:
    def status() -> str:
        return str(httpx.get(f"{slow_world.url}/health", timeout=5).json()["status"])

    engine = living_engine(slow_world)
    assert status() == "ok"
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        eventually(lambda: status() == "degraded", seconds=12)
        began = time.monotonic()
        assert "whet:engine_up 1.0" in slow_world.get("/metrics", key="admin").text
        assert time.monotonic() - began < 3
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    eventually(lambda: status() == "ok", seconds=12)


def test_an_engine_killed_under_a_whole_answer_is_a_503(slow_world: World) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(slow_world.post, "/v1/chat/completions", CHAT | {"max_tokens": 400})
        eventually(lambda: "vllm:num_requests_running 1.0" in slow_world.get("/metrics", key="admin").text)
        living_engine(slow_world).kill()
        response = answer.result(timeout=5)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    bring_back(slow_world)
