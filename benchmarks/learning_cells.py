"""What every simulation of the learning loop comes to: one cell of README's table."""

from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A claim, its goal, what was measured, whether that meets it, and the figures behind."""

    what: str
    goal: str
    measured: str
    met: bool
    raw: dict[str, Any]
