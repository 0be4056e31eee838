"""The gateway's hold on an engine that is slow to load, mute, or cannot read an adapter just now."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import pytest

from engine.client import EngineClient, EngineGone, EngineRefused, PoolFailed
from engine.messages import Finished, Generate, Pool, Pooled, Sampling, Status, Tokens
from services.errors import Unavailable
from services.gateway import engine_link
from services.gateway.engine_link import EngineLink
from services.gateway.pooling import Prompt, pool_all
from tests.gateway.test_planning import ENGINE

T = TypeVar("T")
NEW, OLD = "a" * 64, "b" * 64
UNLOADED = Finished(epoch=1, id="asked", reason="error", code="adapter_not_loaded")
DEADLINE, LOADING = 5.0, 0.3


@dataclass
class Scripted:
    """What the link needs of a client. Adapters load after a while, or are refused as `refusal` says."""

    refusal: EngineRefused | None = None
    mute: bool = False
    connected: bool = True
    epoch: int = 1
    loaded: set[str] = field(default_factory=set)
    asked: list[Generate | Pool] = field(default_factory=list)

    async def load_adapter(self, digest: str, path: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        await asyncio.sleep(LOADING)
        self.loaded.add(digest)

    async def generate(self, message: Generate) -> AsyncGenerator[Tokens | Finished]:
        self.asked.append(message)
        ready = message.adapter in self.loaded
        yield Tokens(epoch=1, id=message.id, token_ids=[5], logprobs=[0.0]) if ready else UNLOADED

    async def pool(self, message: Pool) -> Pooled:
        self.asked.append(message)
        if message.adapter != OLD and message.adapter not in self.loaded:
            raise PoolFailed(UNLOADED)
        return Pooled(epoch=1, id=message.id, vector=bytes(8), prompt_tokens=1)

    async def status(self, *, seconds: float = 30.0) -> Status:
        if self.mute:
            await asyncio.sleep(seconds)
            raise EngineGone("mute")
        return msgspec.structs.replace(ENGINE, epoch=self.epoch)

    async def close(self) -> None:
        self.connected = False


def linked(client: Scripted) -> EngineLink:
    return EngineLink(cast(EngineClient, client), Path("artifacts"))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 20))


def generate(deadline: float) -> Generate:
    return Generate(id="asked", prompt=[5], sampling=Sampling(seed=0, max_tokens=1), deadline_seconds=deadline)


def test_loading_an_adapter_takes_its_time_from_the_deadline() -> None:
    client = Scripted()
    opened = run(linked(client).open(generate(DEADLINE), [NEW]))
    assert isinstance(opened.first, Tokens)
    first, second = (message.deadline_seconds for message in client.asked)
    assert first == pytest.approx(DEADLINE, abs=0.1)
    assert 0 < second <= DEADLINE - LOADING


def test_loading_an_adapter_takes_its_time_from_a_vectors_deadline() -> None:
    client = Scripted()
    run(pool_all(linked(client), [Prompt([5])], Pool(id="", prompt=[], deadline_seconds=DEADLINE), [NEW]))
    assert 0 < client.asked[1].deadline_seconds <= DEADLINE - LOADING


def test_no_deadline_stays_none() -> None:
    client = Scripted()
    run(linked(client).open(generate(0.0), [NEW]))
    assert [message.deadline_seconds for message in client.asked] == [0.0, 0.0]


def test_vectors_fall_back_from_a_broken_adapter_but_not_from_one_that_cannot_be_read_now() -> None:
    shared = Pool(id="", prompt=[])
    broken = linked(Scripted(refusal=EngineRefused("no such file")))
    assert run(pool_all(broken, [Prompt([5])], shared, [NEW, OLD])).adapter == OLD
    momentary = linked(Scripted(refusal=EngineRefused("disk is away", transient=True)))
    with pytest.raises(Unavailable, match="cannot be loaded now"):
        run(pool_all(momentary, [Prompt([5])], shared, [NEW, OLD]))


def test_a_mute_engine_is_known_as_it_was_and_then_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(engine_link, "WEDGED_SECONDS", 0.3)

    async def body() -> None:
        client = Scripted()
        link = linked(client)
        assert await link.look() is not None
        assert link.silent_seconds < 0.2
        client.mute = True
        assert await link.look() is not None
        while link.silent_seconds <= 0.3:
            await asyncio.sleep(0.05)
        began = time.monotonic()
        assert await link.look() is None
        assert time.monotonic() - began < 0.2
        client.mute = False
        assert await link.look() is not None

    run(body())


def test_a_living_engine_is_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(engine_link, "WATCH_SECONDS", 0.01)

    async def body() -> None:
        link = linked(Scripted())
        link.start()
        await asyncio.sleep(0.5)
        assert link.known is not None
        assert link.silent_seconds < 0.4
        await link.close()

    run(body())
