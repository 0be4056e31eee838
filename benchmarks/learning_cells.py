"""What every part of benchmarks/learning.py hands in."""

from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One line of the table: what was asked, what was measured, and the raw figures behind it."""

    what: str
    goal: str
    measured: str
    met: bool
    raw: dict[str, Any]
