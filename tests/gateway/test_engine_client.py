"""The engine's client, held against an engine that is nothing but a socket."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from engine.client import EngineClient, EngineGone, EngineRefused, Inbox
from engine.messages import (
    Cancel,
    Done,
    Draft,
    Finished,
    FromEngine,
    Generate,
    GetStatus,
    Learn,
    LoadSpeculator,
    Pool,
    Sampling,
    ToEngine,
    Tokens,
    UnloadSpeculator,
    decode_to_engine,
    encode,
)

ASKED = Generate(id="asked", prompt=[5], sampling=Sampling(seed=0, max_tokens=9))


@asynccontextmanager
async def mute_engine(address: str) -> AsyncIterator[zmq.asyncio.Socket]:
    """Takes everything and never answers."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


async def heard(socket: zmq.asyncio.Socket) -> ToEngine:
    """The next message that is no heartbeat."""
    while True:
        _, frame = await asyncio.wait_for(socket.recv_multipart(), 5)
        if not isinstance(message := decode_to_engine(frame), GetStatus):
            return message


@pytest.mark.parametrize("asked", [ASKED, Pool(id="asked", prompt=[5])])
def test_what_was_given_up_in_silence_is_cancelled(tmp_path: Path, asked: Generate | Pool) -> None:
    async def body() -> None:
        address = f"ipc://{tmp_path / 'mute.sock'}"
        async with mute_engine(address) as socket, EngineClient(address, silence_seconds=1.0) as client:
            with pytest.raises(EngineGone, match="stopped answering"):
                await (client.complete(asked) if isinstance(asked, Generate) else client.pool(asked))
            assert await heard(socket) == asked
            assert await heard(socket) == Cancel(id="asked")

    asyncio.run(body())


def tokens(first: int, count: int, *, cached: int = 0) -> Tokens:
    """Tokens whose numbers tell which log-probabilities and alternatives are theirs."""
    ids = list(range(first, first + count))
    return Tokens(
        epoch=1, id="asked", token_ids=ids, logprobs=[-float(token) for token in ids],
        top=[[(token, -float(token)), (token + 100, -50.0)] for token in ids], cached_tokens=cached,
    )  # fmt: skip


def drafted(first: int, drafts: list[Draft], speculator: str = "") -> Tokens:
    """One step's tokens, of which the drafts that won brought all but the last."""
    count = 1 + sum(draft.accepted for draft in drafts if draft.won)
    return msgspec.structs.replace(tokens(first, count), drafts=drafts, speculator=speculator)


def test_tokens_that_queued_up_come_together_and_keep_what_belongs_to_each(tmp_path: Path) -> None:
    ending = Finished(epoch=1, id="asked", reason="stop")

    async def body() -> tuple[FromEngine, FromEngine]:
        inbox: Inbox = asyncio.Queue()
        for reply in (tokens(1, 1, cached=7), tokens(2, 2), tokens(4, 1), ending):
            inbox.put_nowait(reply)
        waiting: deque[FromEngine | EngineGone] = deque()
        async with EngineClient(f"ipc://{tmp_path / 'nobody.sock'}") as client:
            return await client._next_joined(inbox, waiting), await client._next_joined(inbox, waiting)

    joined, last = asyncio.run(body())
    assert joined == msgspec.structs.replace(tokens(1, 4, cached=7), steps=3)
    assert last == ending


def test_steps_and_drafts_of_queued_tokens_are_added_up(tmp_path: Path) -> None:
    suffix, heads = Draft("suffix", 4, 2), Draft("heads", 3, 3)
    lesser = Draft("suffix", 2, 1, won=False)

    async def body() -> FromEngine:
        inbox: Inbox = asyncio.Queue()
        for reply in (drafted(1, [suffix]), drafted(4, []), drafted(5, [heads, lesser], "aa"), drafted(9, [], "bb")):
            inbox.put_nowait(reply)
        async with EngineClient(f"ipc://{tmp_path / 'nobody.sock'}") as client:
            return await client._next_joined(inbox, deque())

    joined = asyncio.run(body())
    assert isinstance(joined, Tokens)
    assert joined.token_ids == list(range(1, 10))
    assert (joined.steps, joined.drafts) == (4, [suffix, heads, lesser])
    assert joined.speculator == "bb"


def test_speculator_commands_say_what_serves_and_what_was_refused(tmp_path: Path) -> None:
    async def body() -> list[ToEngine]:
        address = f"ipc://{tmp_path / 'engine.sock'}"
        heard_all: list[ToEngine] = []

        async def answer(socket: zmq.asyncio.Socket) -> None:
            for error, serving in (("", "new"), ("the base is another", "old"), ("", ""), ("", "")):
                sender, frame = await socket.recv_multipart()
                heard_all.append(decode_to_engine(frame))
                done = Done(epoch=1, id=heard_all[-1].id, error=error, serving=serving)
                await socket.send_multipart([sender, encode(done)])

        async with mute_engine(address) as socket, EngineClient(address) as client:
            answering = asyncio.create_task(answer(socket))
            assert await client.load_speculator("new", "place", replaces="old") == "new"
            with pytest.raises(EngineRefused, match="the base is another"):
                await client.load_speculator("bad", "place")
            await client.unload_speculator("new")
            await client.learn("project", [[1, 2], [3]])
            await answering
        return heard_all

    load, refused, unload, learn = asyncio.run(body())
    assert load == LoadSpeculator(id=load.id, digest="new", path="place", replaces="old")
    assert isinstance(refused, LoadSpeculator)
    assert refused.replaces == ""
    assert unload == UnloadSpeculator(id=unload.id, digest="new")
    assert learn == Learn(id=learn.id, namespace="project", responses=[[1, 2], [3]])
