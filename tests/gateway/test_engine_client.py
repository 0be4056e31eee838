"""The engine's client, held against an engine that is nothing but a socket."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from engine.client import EngineClient, EngineGone, Inbox
from engine.messages import (
    Cancel,
    Finished,
    FromEngine,
    Generate,
    GetStatus,
    Pool,
    Sampling,
    ToEngine,
    Tokens,
    decode_to_engine,
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
    assert joined == tokens(1, 4, cached=7)
    assert last == ending
