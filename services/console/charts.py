"""Geometry of the console's drawings: numbers in, SVG coordinates out. Templates draw, style sheets colour."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

# Steps of a time axis, in seconds.
TIME_STEPS = (15, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 14_400, 21_600)
# The smallest span drawn, relative to the numbers: below it floats run out of steps between two ticks.
FINEST = 1e-9


class Spark(NamedTuple):
    """Bars of a sparkline: x, y, width, height."""

    width: int
    height: int
    bars: list[tuple[float, float, float, float]]


class Tick(NamedTuple):
    """A mark on an axis and its label."""

    at: float
    label: str


class Line(NamedTuple):
    """A line chart: the path, the area under it, its last point, and the ticks of both axes."""

    width: int
    height: int
    left: int
    bottom: int
    path: str
    area: str
    points: list[tuple[float, float, float, float]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


class Reading(NamedTuple):
    """A figure at a moment (seconds since the epoch), with its interval and how many it was taken from."""

    at: float
    value: float
    low: float
    high: float
    answers: int


class Band(NamedTuple):
    """A series with the band of its intervals: paths, and (x, y, reading) of each point."""

    path: str
    area: str
    points: list[tuple[float, float, Reading]]


class Bands(NamedTuple):
    """Series over time on common axes."""

    width: int
    height: int
    left: int
    bottom: int
    series: list[Band]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


class Columns(NamedTuple):
    """Columns over time, each cut into shares: (x, width, [(y, height)]), the first share at the bottom."""

    width: int
    height: int
    left: int
    bottom: int
    columns: list[tuple[float, float, list[tuple[float, float]]]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


class Interval(NamedTuple):
    """A row of a forest plot in pixels: estimate, low, high."""

    at: float
    low: float
    high: float


class Forest(NamedTuple):
    """Intervals around a zero line, on one scale."""

    width: int
    zero: float
    rows: list[Interval]
    ticks: list[Tick]
    margin: float | None


def spark(values: Sequence[float], width: int = 120, height: int = 28) -> Spark:
    """A bar a value; silent hours keep a hairline so that the axis can be read."""
    top, step = max([*values, 1]), width / max(len(values), 1)
    bars = []
    for index, value in enumerate(values):
        tall = max(1.5, (height - 2) * value / top) if value else 1.0
        bars.append((round(index * step, 2), round(height - tall, 2), round(step * 0.68, 2), round(tall, 2)))
    return Spark(width, height, bars)


def line_chart(points: Sequence[tuple[float, float]], width: int = 320, height: int = 170) -> Line:
    """A line through (x, y) points in order, over a y axis that holds 0. Points that are no numbers are left out."""
    left, right, top, bottom = 46, 8, 10, height - 26
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    xs, ys = [x for x, _ in finite] or [0.0, 1.0], [y for _, y in finite] or [0.0, 1.0]
    x_low = min(xs)
    x_high = max(max(xs), x_low + max(1.0, FINEST * abs(x_low)))
    y_marks = ticks(min(0.0, *ys), max(0.0, *ys), 4)
    y_low, y_high = y_marks[0], y_marks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return round(across, 1), round(bottom - (y - y_low) / (y_high - y_low) * (bottom - top), 1)

    placed = [(*place(x, y), x, y) for x, y in finite]
    path = " ".join(f"{'L' if index else 'M'}{point[0]},{point[1]}" for index, point in enumerate(placed))
    area = f"{path} L{placed[-1][0]},{bottom} L{placed[0][0]},{bottom} Z" if len(placed) > 1 else ""
    x_marks = [mark for mark in ticks(x_low, x_high, 5) if x_low <= mark <= x_high]
    return Line(
        width, height, left, bottom, path, area, placed,
        [Tick(place(mark, y_low)[0], label(mark)) for mark in x_marks],
        [Tick(place(x_low, mark)[1], label(mark)) for mark in y_marks],
    )  # fmt: skip


def bands(
    series: Sequence[Sequence[Reading]], since: float, until: float, width: int = 680, height: int = 236
) -> Bands:
    """Each series as a line through its readings inside the band of their intervals, over a y axis from 0."""
    left, right, top, bottom = 46, 10, 10, height - 26
    y_marks = ticks(0.0, max([reading.high for one in series for reading in one], default=1.0), 4)

    def place(at: float, value: float) -> tuple[float, float]:
        across = left + (at - since) / (until - since) * (width - left - right)
        return round(across, 1), round(bottom - value / y_marks[-1] * (bottom - top), 1)

    def drawn(readings: Sequence[Reading]) -> Band:
        points = [(*place(reading.at, reading.value), reading) for reading in readings]
        edge = [place(reading.at, reading.low) for reading in readings]
        edge += [place(reading.at, reading.high) for reading in reversed(readings)]
        return Band(_path([point[:2] for point in points]), f"{_path(edge)} Z" if len(readings) > 1 else "", points)

    return Bands(
        width, height, left, bottom, [drawn(one) for one in series],
        [Tick(place(tick.at, 0.0)[0], tick.label) for tick in _times(since, until, width // 90)],
        [Tick(place(since, mark)[1], label(mark)) for mark in y_marks],
    )  # fmt: skip


def columns(
    shares: Sequence[Sequence[float]], since: float, until: float, width: int = 320, height: int = 170
) -> Columns:
    """A column for each equal span of [since, until]; its shares add up to at most 1. An empty one stays empty."""
    left, right, top, bottom = 46, 8, 10, height - 26
    step = (width - left - right) / max(1, len(shares))
    made = []
    for index, parts in enumerate(shares):
        stretches, base = [], float(bottom)
        for part in parts:
            tall = part * (bottom - top)
            base -= tall
            stretches.append((round(base, 1), round(tall, 1)))
        made.append((round(left + index * step, 1), round(step * 0.8, 1), stretches))
    across = (width - left - right) / (until - since)
    return Columns(
        width, height, left, bottom, made,
        [Tick(round(left + (tick.at - since) * across, 1), tick.label) for tick in _times(since, until, width // 90)],
        [Tick(round(bottom - mark * (bottom - top), 1), f"{100 * mark:.0f} %") for mark in (0.0, 0.5, 1.0)],
    )  # fmt: skip


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if index else 'M'}{x},{y}" for index, (x, y) in enumerate(points))


def _times(since: float, until: float, wanted: int) -> list[Tick]:
    """Round moments within, about `wanted` of them, as UTC clock times, or dates where days are between them."""
    step = next((one for one in TIME_STEPS if (until - since) / one <= wanted), 86_400)
    if step == 86_400:
        step *= max(1, math.ceil((until - since) / step / wanted))
    form = "%H:%M:%S" if step < 60 else "%H:%M" if step < 86_400 else "%-d %b"
    marks = range(math.ceil(since / step) * step, math.floor(until) + 1, step)
    return [Tick(mark, datetime.fromtimestamp(mark, UTC).strftime(form)) for mark in marks]


def forest(intervals: Sequence[tuple[float, float, float]], width: int = 360, margin: float | None = None) -> Forest:
    """Rows of (estimate, low, high) on a common scale that always shows zero and, when given, the margin line."""
    values = [value for row in intervals for value in row] + [0.0] + ([margin] if margin is not None else [])
    marks = ticks(min(values), max(values), 5)
    low, high = marks[0], marks[-1]

    def place(value: float) -> float:
        return round(14 + (value - low) / (high - low) * (width - 28), 1)

    rows = [Interval(place(at), place(down), place(up)) for at, down, up in intervals]
    labels = [Tick(place(mark), f"{100 * mark:+.0f}".replace("-", "−") if mark else "0") for mark in marks]
    return Forest(width, place(0.0), rows, labels, None if margin is None else place(margin))


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers that cover [low, high], about `wanted` of them; where all is one value, they go up from it."""
    if low == high:
        high = low + (abs(low) or 1.0)
    high = max(high, low + FINEST * max(1.0, abs(low), abs(high)))
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def label(value: float) -> str:
    """A tick's label without needless digits."""
    if value and abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−")
    return (f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}").replace("-", "−")
