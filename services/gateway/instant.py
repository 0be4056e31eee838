"""What takes effect at once, as a gateway holds it: pinned answers and the shelves of corrections, by project.

Both are read again only where they have changed: a checksum over a project's row ids says so, whatever order the
transactions committed in, because no row's text ever changes under its id.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, func, select, text

from services.store.models import ExampleEmbedding, Pin
from services.store.worked import MOST_EXAMPLES

Vectors = NDArray[np.float32]
# As `vector_send` writes it: two 16-bit words, the dimension first, then big-endian fp32.
HEADER_BYTES = 4
SMALLEST = np.finfo(np.float32).tiny


class Mark(NamedTuple):
    """What a project's rows were when they were read."""

    rows: int
    checksum: int


class KnownPin(NamedTuple):
    """An approved answer."""

    id: UUID
    answer: str


@dataclass(frozen=True)
class Board:
    """A project's pins by the hash of their request."""

    mark: Mark
    pins: Mapping[str, KnownPin]


@dataclass(frozen=True)
class Shelf:
    """A project's corrections [n] and their vectors [n, size], each of length one; of one base model."""

    mark: Mark
    base: str
    ids: tuple[UUID, ...]
    shown: tuple[str, ...]
    completions: tuple[str, ...]
    vectors: Vectors


@dataclass(frozen=True)
class Instant:
    """Boards and shelves by project; a project without any has none."""

    boards: Mapping[UUID, Board] = field(default_factory=dict)
    shelves: Mapping[UUID, Shelf] = field(default_factory=dict)


def load(connection: Connection, before: Instant) -> Instant:
    """What is in force now; what has not changed since `before` is taken from there."""
    pins = _marks(connection, Pin.project_id, Pin.id, Pin.state == "live")
    examples = _marks(connection, ExampleEmbedding.project_id, ExampleEmbedding.example_id, text("true"))
    boards: dict[UUID, Board] = {}
    for project_id, mark in pins.items():
        board = before.boards.get(project_id)
        boards[project_id] = board if board and board.mark == mark else _board(connection, project_id, mark)
    shelves: dict[UUID, Shelf] = {}
    for project_id, mark in examples.items():
        shelf = before.shelves.get(project_id)
        shelves[project_id] = shelf if shelf and shelf.mark == mark else _shelf(connection, project_id, mark)
    return Instant(boards, shelves)


def _marks(connection: Connection, project: Any, row: Any, where: Any) -> dict[UUID, Mark]:  # noqa: ANN401 - columns
    checksum = func.bit_xor(func.hashtextextended(func.concat(row), 0))
    found = connection.execute(select(project, func.count(), checksum).where(where).group_by(project))
    return {project_id: Mark(rows, checksum) for project_id, rows, checksum in found}


def _board(connection: Connection, project_id: UUID, mark: Mark) -> Board:
    query = select(Pin.request_hash, Pin.id, Pin.answer).where(Pin.project_id == project_id, Pin.state == "live")
    return Board(mark, {row.request_hash: KnownPin(row.id, row.answer) for row in connection.execute(query)})


def _shelf(connection: Connection, project_id: UUID, mark: Mark) -> Shelf:
    """The newest; while the base model is being changed, those of the base that the newest are of."""
    query = (
        select(
            ExampleEmbedding.example_id, ExampleEmbedding.base_digest, ExampleEmbedding.shown,
            ExampleEmbedding.completion, func.vector_send(ExampleEmbedding.embedding).label("packed"),
        )
        .where(ExampleEmbedding.project_id == project_id)
        .order_by(ExampleEmbedding.created_at.desc(), ExampleEmbedding.example_id)
        .limit(MOST_EXAMPLES)
    )  # fmt: skip
    rows = connection.execute(query).all()
    base = rows[0].base_digest if rows else ""
    rows = [row for row in rows if row.base_digest == base]
    return Shelf(
        mark, base, tuple(row.example_id for row in rows), tuple(row.shown for row in rows),
        tuple(row.completion for row in rows), _unit([_unpack(row.packed) for row in rows]),
    )  # fmt: skip


def _unpack(packed: bytes) -> Vectors:
    return np.frombuffer(packed, dtype=">f4", offset=HEADER_BYTES).astype(np.float32)


def _unit(vectors: list[Vectors]) -> Vectors:
    stacked = np.stack(vectors) if vectors else np.zeros((0, 1), np.float32)
    unit: Vectors = stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), SMALLEST)
    return unit
