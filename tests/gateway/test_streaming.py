"""Several choices in one stream, without a process in between."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import pytest

from services.errors import WhetError
from services.gateway.generation import Choice
from services.gateway.pieces import Piece
from services.gateway.streaming import _interleaved

PIECES = 1000


@dataclass
class Talker:
    """A choice that always has something to say, until it ends or `fails`."""

    index: int
    fails: bool = False
    said: int = 0
    closed: bool = False

    async def pieces(self) -> AsyncGenerator[Piece]:
        try:
            while self.said < PIECES:
                await asyncio.sleep(0)
                self.said += 1
                yield Piece(f"{self.said} ")
            if self.fails:
                raise WhetError("broken")
        finally:
            self.closed = True


def choices(*talkers: Talker) -> list[Choice]:
    return [cast(Choice, talker) for talker in talkers]


def test_choices_wait_for_a_slow_reader() -> None:
    talkers = [Talker(0), Talker(1), Talker(2)]

    async def body() -> None:
        async with aclosing(_interleaved(choices(*talkers))) as pieces:
            await anext(pieces)
            for _ in range(200):
                await asyncio.sleep(0)
            assert sum(talker.said for talker in talkers) <= 1 + 2 * len(talkers)

    asyncio.run(body())
    assert all(talker.closed for talker in talkers)


def test_every_piece_arrives_in_its_choices_order() -> None:
    async def body() -> list[str]:
        texts = ["", ""]
        async with aclosing(_interleaved(choices(Talker(0), Talker(1)))) as pieces:
            async for index, piece in pieces:
                texts[index] += "end" if piece is None else piece.text
        return texts

    assert asyncio.run(body()) == ["".join(f"{number + 1} " for number in range(PIECES)) + "end"] * 2


def test_a_failure_ends_the_other_choices() -> None:
    talkers = [Talker(0), Talker(1, fails=True, said=PIECES)]

    async def body() -> None:
        async with aclosing(_interleaved(choices(*talkers))) as pieces:
            async for _ in pieces:
                pass

    with pytest.raises(WhetError, match="broken"):
        asyncio.run(asyncio.wait_for(body(), 10))
    assert talkers[0].closed
    assert talkers[0].said < PIECES
