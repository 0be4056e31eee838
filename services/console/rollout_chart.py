"""The confidence sequence as a drawing: what is known of the difference after so many requests, and the gates."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.console.charts import Tick, label, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 680, 236, 52, 10, 12, 28
# The first looks reach so far that what follows would be a line: they are cut off at so much of what is known now.
SPREAD = 1.0


class Gate(NamedTuple):
    """A line that ends the trial when the whole interval is beyond it."""

    name: str
    words: str
    at: float


class Drawn(NamedTuple):
    """Paths and ticks in pixels, gates with their heights."""

    width: int
    height: int
    left: int
    bottom: int
    line: str
    area: str
    last: tuple[float, float]
    gates: list[Gate]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def draw(track: Sequence[Mapping[str, Any]], gates: Sequence[Gate], *, share: bool) -> Drawn | None:
    """The track's points over requests; None before the first. `share` tells differences in points."""
    if not track:
        return None
    bottom = HEIGHT - FOOT
    newest = track[-1]
    reach = SPREAD * max(newest["high"] - newest["low"], 1e-6)
    low = min([max(newest["estimate"] - reach, min(p["low"] for p in track)), *(gate.at for gate in gates)])
    high = max([min(newest["estimate"] + reach, max(p["high"] for p in track)), *(gate.at for gate in gates)])
    marks = ticks(low, high, 5)
    most = max(p["requests"] for p in track)

    def place(requests: float, value: float) -> tuple[float, float]:
        value = min(max(value, marks[0]), marks[-1])
        across = LEFT + requests / most * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(bottom - (value - marks[0]) / (marks[-1] - marks[0]) * (bottom - TOP), 1)

    upper = [place(p["requests"], p["high"]) for p in track]
    lower = [place(p["requests"], p["low"]) for p in track]
    middle = [place(p["requests"], p["estimate"]) for p in track]
    across_marks = [mark for mark in ticks(0, most, 6) if mark <= most]
    return Drawn(
        WIDTH, HEIGHT, LEFT, bottom, _path(middle), f"{_path([*upper, *reversed(lower)])} Z", middle[-1],
        [gate._replace(at=place(0, gate.at)[1]) for gate in gates],
        [Tick(place(mark, marks[0])[0], label(mark)) for mark in across_marks],
        [Tick(place(0, mark)[1], _points(mark) if share else label(mark)) for mark in marks],
    )  # fmt: skip


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if index else 'M'}{x},{y}" for index, (x, y) in enumerate(points))


def _points(value: float) -> str:
    return "0" if not value else f"{100 * value:+g}".replace("-", "−")
