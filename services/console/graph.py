"""Boxes in columns with curves between them: the geometry of every lineage drawing."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

BOX_HEIGHT, ROW_GAP, TOP = 48, 16, 30
LETTER = 7.3  # pixels a letter of a title takes, about


class Node(NamedTuple):
    """A box without its place: two lines of text, where it leads, and whether it is here, live, good or bad."""

    title: str
    detail: str = ""
    href: str | None = None
    mood: str = ""


class Box(NamedTuple):
    """A placed node, its texts cut to fit; `told` is what they were."""

    x: float
    y: float
    title: str
    detail: str
    href: str | None
    mood: str
    told: str


class Column(NamedTuple):
    """A step of the way, and its nodes from top to bottom."""

    head: str
    nodes: Sequence[Node]


class Place(NamedTuple):
    """A node, by its column and its row."""

    column: int
    row: int


class Drawing(NamedTuple):
    """What the template draws. `told` is the same in a sentence, for who cannot see it."""

    width: float
    height: float
    box_width: float
    heads: list[tuple[float, str]]
    boxes: list[Box]
    paths: list[str]
    told: str


def lay_out(
    columns: Sequence[Column], edges: Iterable[tuple[Place, Place]], told: str, *, width: float, box_width: float
) -> Drawing:
    """Columns spread over `width`, each centred; edges between columns curve, within one they run straight."""
    step = (width - box_width) / max(1, len(columns) - 1)
    height = TOP + max((len(column.nodes) for column in columns), default=0) * (BOX_HEIGHT + ROW_GAP)
    letters = int((box_width - 24) / LETTER)
    placed = [_stacked(column, round(place * step, 1), height, letters) for place, column in enumerate(columns)]
    paths = [_path(placed[a.column][a.row], placed[b.column][b.row], box_width) for a, b in edges]
    heads = [(round(place * step, 1), column.head) for place, column in enumerate(columns) if column.nodes]
    return Drawing(width, height, box_width, heads, [box for column in placed for box in column], paths, told)


def _stacked(column: Column, x: float, height: float, letters: int) -> list[Box]:
    used = len(column.nodes) * (BOX_HEIGHT + ROW_GAP) - ROW_GAP
    start = TOP + (height - TOP - ROW_GAP - used) / 2
    return [
        Box(
            x, start + row * (BOX_HEIGHT + ROW_GAP), cut(node.title, letters), cut(node.detail, letters + 2),
            node.href, node.mood, f"{node.title}, {node.detail}" if node.detail else node.title,
        )
        for row, node in enumerate(column.nodes)
    ]  # fmt: skip


def _path(one: Box, other: Box, box_width: float) -> str:
    if one.x == other.x:
        above, below = sorted((one, other), key=lambda box: box.y)
        middle = one.x + box_width / 2
        return f"M{middle:g},{above.y + BOX_HEIGHT:g} L{middle:g},{below.y:g}"
    start, end = one.x + box_width, other.x
    bend = (start + end) / 2
    y, z = one.y + BOX_HEIGHT / 2, other.y + BOX_HEIGHT / 2
    return f"M{start:g},{y:g} C{bend:g},{y:g} {bend:g},{z:g} {end:g},{z:g}"


def cut(text: str, letters: int) -> str:
    """At most so many letters."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
