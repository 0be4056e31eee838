"""A run's drawings: curves, how long each phase took, how much each row teaches, the trials of a sweep."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from services.console import charts
from services.store.models import RunEvent

# What the trainer reports, in the order it is drawn: title, event kind, name, a word on it.
CURVES = (
    ("Loss", "progress", "loss"),
    ("Validation, nats a token", "validation", "loss"),
    ("Reward margin, better less worse", "progress", "margin"),
    ("Pairs won by the better answer", "progress", "preferred"),
    ("Validation pairs won", "validation", "preferred"),
    ("Distance from the base (KL)", "progress", "kl"),
    ("Expected tokens per step (τ)", "progress", "tau"),
    ("Learning rate", "progress", "lr"),
    ("Gradient norm", "progress", "grad_norm"),
    ("Tokens per second", "progress", "tokens_per_second"),
    ("Memory, MB", "progress", "memory_mb"),
)
# Endings are moments, not stretches.
ENDINGS = ("cancelled", "failed", "refused", "shadow", "canary", "live", "quarantined", "superseded", "verified")


class Span(NamedTuple):
    """A phase: from and width in pixels, its share of the whole in words."""

    name: str
    x: float
    width: float
    seconds: float
    now: bool


class Timeline(NamedTuple):
    """Phases one under the other on a common time axis."""

    width: int
    height: int
    left: int
    bottom: int
    spans: list[Span]
    x_ticks: list[charts.Tick]


class Bar(NamedTuple):
    """A bucket of a histogram, in pixels."""

    label: str
    rows: int
    x: float
    y: float
    width: float
    height: float


class Bars(NamedTuple):
    """A histogram on a y axis from 0."""

    width: int
    height: int
    left: int
    bottom: int
    bars: list[Bar]
    y_ticks: list[charts.Tick]


class TrialLine(NamedTuple):
    """A candidate through the rungs it reached: (x, y, loss) of each."""

    candidate: int
    path: str
    points: list[tuple[float, float, float]]
    chosen: bool


class Trials(NamedTuple):
    """Candidates of a sweep: validation by steps given."""

    width: int
    height: int
    left: int
    bottom: int
    lines: list[TrialLine]
    x_ticks: list[charts.Tick]
    y_ticks: list[charts.Tick]


def curves(events: Sequence[RunEvent]) -> list[tuple[str, charts.Line]]:
    """A chart for each thing the trainer reports, in this order, when it does."""
    made = []
    for title, kind, name in CURVES:
        points = going_on([point for event in events if (point := _point(event, kind, name)) is not None])
        if points:
            made.append((title, charts.line_chart(points)))
    return made


def _point(event: RunEvent, kind: str, name: str) -> tuple[float, float] | None:
    value = event.payload.get(name)
    if event.kind != kind or event.step is None or not isinstance(value, int | float):
        return None
    return float(event.step), float(value)


def going_on(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """One line through the attempts: where a trainer went on from a checkpoint, what it did again counts."""
    kept: list[tuple[float, float]] = []
    for step, value in points:
        while kept and kept[-1][0] >= step:
            kept.pop()
        kept.append((step, value))
    return kept


def timeline(events: Sequence[RunEvent], until: datetime, width: int = 880) -> Timeline | None:
    """How long each phase took; None before there are two moments to speak of. The last one ends at `until`."""
    phases = [event for event in events if event.kind == "phase" and event.at <= until]
    told = [(str(event.payload.get("phase")), event.at) for event in phases]
    if not told or (until - told[0][1]).total_seconds() <= 0:
        return None
    started, left, row, right = told[0][1], 150, 24, 62
    whole = (until - started).total_seconds()
    scale = (width - left - right) / whole
    spans = []
    for place, (name, at) in enumerate(told):
        end = told[place + 1][1] if place + 1 < len(told) else until
        seconds = (end - at).total_seconds()
        if name in ENDINGS and place + 1 == len(told):
            continue
        x = left + (at - started).total_seconds() * scale
        spans.append(Span(name, round(x, 1), round(max(2.0, seconds * scale), 1), seconds, place + 1 == len(told)))
    bottom = row * len(spans) + 6
    marks = [mark for mark in charts.ticks(0.0, whole, 5) if mark <= whole]
    axis = [charts.Tick(round(left + mark * scale, 1), _clock(mark)) for mark in marks]
    return Timeline(width, bottom + 22, left, bottom, spans, axis)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes else f"{seconds:g} s"


def histogram(buckets: Mapping[str, int], width: int = 450, height: int = 160) -> Bars | None:
    """Rows by how many tokens they teach, in the buckets' order; None when there is nothing to draw."""
    if not buckets:
        return None
    left, right, top, bottom = 40, 6, 16, height - 24
    ordered = sorted(buckets.items(), key=lambda pair: (pair[0].startswith(">"), int(pair[0].lstrip("<=>"))))
    marks = [mark for mark in charts.ticks(0.0, max(buckets.values()), 3) if mark == round(mark)]
    step = (width - left - right) / len(ordered)
    bars = []
    for place, (name, rows) in enumerate(ordered):
        tall = rows / marks[-1] * (bottom - top)
        label = name.replace("<=", "≤ ").replace(">", "> ")
        x = left + (place + 0.12) * step
        bars.append(Bar(label, rows, round(x, 1), round(bottom - tall, 1), round(step * 0.76, 1), round(tall, 1)))
    axis = [charts.Tick(round(bottom - mark / marks[-1] * (bottom - top), 1), charts.label(mark)) for mark in marks]
    return Bars(width, height, left, bottom, bars, axis)


def trial_rows(events: Sequence[RunEvent]) -> list[dict[str, Any]]:
    """What each candidate got and gave, once a rung; a retried attempt tells some of them again."""
    found = {(event.payload["candidate"], event.payload["rung"]): event.payload for event in _trials(events)}
    return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]


def trial_plot(rows: Sequence[Mapping[str, Any]], width: int = 480, height: int = 200) -> Trials | None:
    """A line for each candidate through its rungs. Trials that blew up have no place on the axis."""
    known = [row for row in rows if row["loss"] < 1e6]
    if not known:
        return None
    left, right, top, bottom = 46, 16, 12, height - 26
    xs, ys = [float(row["steps"]) for row in known], [float(row["loss"]) for row in known]
    y_marks = charts.ticks(min(ys), max(ys), 4)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return round(across, 1), round(bottom - (y - y_marks[0]) / (y_marks[-1] - y_marks[0]) * (bottom - top), 1)

    lines = []
    last = max(row["rung"] for row in rows)
    for candidate in sorted({row["candidate"] for row in known}):
        mine = [row for row in known if row["candidate"] == candidate]
        points = [(*place(row["steps"], row["loss"]), float(row["loss"])) for row in mine]
        path = " ".join(f"{'L' if at else 'M'}{x},{y}" for at, (x, y, _) in enumerate(points))
        lines.append(TrialLine(candidate, path, points, any(row["rung"] == last and row["kept"] for row in mine)))
    x_marks = [mark for mark in charts.ticks(x_low, x_high, 5) if x_low <= mark <= x_high]
    return Trials(
        width, height, left, bottom, lines,
        [charts.Tick(place(mark, y_marks[0])[0], charts.label(mark)) for mark in x_marks],
        [charts.Tick(place(x_low, mark)[1], charts.label(mark)) for mark in y_marks],
    )  # fmt: skip


def _trials(events: Sequence[RunEvent]) -> list[RunEvent]:
    return [event for event in events if event.kind == "trial"]
