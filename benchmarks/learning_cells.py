"""What every part of benchmarks/learning.py hands in, and how shares are told."""

from typing import Any, NamedTuple

from scipy.stats import binomtest


class Cell(NamedTuple):
    """One line of the table: what was asked, what was measured, and the raw figures behind it."""

    what: str
    goal: str
    measured: str
    met: bool
    raw: dict[str, Any]


def share(count: int, of: int) -> str:
    """A share with its 95 % interval (Clopper and Pearson 1934)."""
    interval = binomtest(count, of).proportion_ci(method="exact")
    return f"{100 * count / of:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
