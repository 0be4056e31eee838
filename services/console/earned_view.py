"""Quality earned as pages show it: a dot for each time weights went live, a line only where dots are comparable."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from fastapi import Request

from services.console.access import Here
from services.console.evaluation_view import metric_name
from services.console.memo import Memo
from services.console.quality_view import measured
from services.console.wording import points
from services.store import earned
from services.store.earned import Earned, Gain, Score, Step

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 250, 46, 14, 26, 206
MARKS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Dot(NamedTuple):
    """A score in pixels: its place and the ends of its interval; `told` says it in words."""

    x: float
    y: float
    low: float
    high: float
    told: str
    mood: str


class Slot(NamedTuple):
    """Where a step stands on the x axis, and its two lines of label."""

    x: float
    name: str
    when: str


class Plot(NamedTuple):
    """`joins` are lines between comparable neighbours, `bases` levels of the base under the dots they belong to,
    `breaks` where the held-out part or the metric changed."""

    width: int
    height: int
    left: int
    bottom: int
    dots: list[Dot]
    slots: list[Slot]
    joins: list[str]
    bases: list[tuple[float, float, Dot]]
    breaks: list[float]
    marks: list[tuple[float, str]]


def context(request: Request, here: Here) -> dict[str, Any]:
    """Everything `quality_earned.html` uses."""
    memo: Memo[Earned] = request.app.state.earned
    known = memo.get(here.project.id, lambda: earned.earned(here.session, here.project.id))
    return {
        "earned": known, "earned_plot": plot(known.steps) if any(step.score for step in known.steps) else None,
        "earned_in_words": in_words(known), "earned_changed": changes(known.steps), "earned_by": metrics(known.steps),
        "live_quality": measured(request, here).quality.recent,
    }  # fmt: skip


def in_words(known: Earned) -> str:
    """What was earned since the base, or why nothing can be said."""
    gain = known.gain
    if gain is None:
        return known.why_not
    interval = f"95 % interval {points(gain.low)} to {points(gain.high)}, on {_rows(gain)}"
    if gain.low > 0:
        return f"points earned since the base: {interval}."
    if gain.high < 0:
        return f"points against the base, so something was lost: {interval}."
    return f"points against the base, which may be nothing: {interval}."


def _rows(gain: Gain) -> str:
    groups = f" in {gain.groups:,} groups" if gain.groups != gain.rows else ""
    return f"{gain.rows:,} held-out rows{groups} that both have answered"


def metrics(steps: Sequence[Step]) -> str:
    """What the scores are of, the newest last."""
    return ", ".join(dict.fromkeys(metric_name(step.metric) for step in steps if step.metric))


def changes(steps: Sequence[Step]) -> str:
    """What breaks the line, in a sentence."""
    broken = sum(not comparable(one, other) for one, other in pairwise(steps))
    if not broken:
        return ""
    return (
        f"The held-out set or the metric changed {broken} time{'' if broken == 1 else 's'}: the line is broken there, "
        "because scores on either side are not comparable."
    )


def comparable(one: Step, other: Step) -> bool:
    """Whether two scores are of the same questions, judged the same way."""
    return one.part is not None and (one.part, one.metric) == (other.part, other.metric)


# --- geometry ---------------------------------------------------------------------------------------------


def plot(steps: Sequence[Step]) -> Plot:
    """One slot a step, the base's own before the first where its score is known there."""
    first = steps[0]
    start = [first._replace(digest=None, score=first.base)] if first.base is not None and first.digest else []
    shown = [*start, *steps]
    gap = (WIDTH - LEFT - RIGHT) / len(shown)
    xs = [round(LEFT + gap * (place + 0.5), 1) for place in range(len(shown))]
    dots = {place: _dot(xs[place], step.score, step) for place, step in enumerate(shown) if step.score is not None}
    joins, breaks = [], []
    for place, (one, other) in enumerate(pairwise(shown)):
        if not comparable(one, other):
            breaks.append(round((xs[place] + xs[place + 1]) / 2, 1))
        elif place in dots and place + 1 in dots:
            joins.append(f"M{dots[place].x},{dots[place].y} L{dots[place + 1].x},{dots[place + 1].y}")
    return Plot(
        WIDTH, HEIGHT, LEFT, BOTTOM, list(dots.values()), _slots(shown, xs, with_base=bool(start)), joins,
        _bases(shown, xs, gap), breaks, [(_y(mark), f"{100 * mark:.0f}") for mark in MARKS],
    )  # fmt: skip


def _slots(shown: Sequence[Step], xs: Sequence[float], *, with_base: bool) -> list[Slot]:
    made = []
    for place, step in enumerate(shown):
        name = step.digest[:6] if step.digest else "base"
        when = "at first" if with_base and place == 0 else f"{step.at:%-d %b}"
        made.append(Slot(xs[place], name, when))
    return made


def _bases(shown: Sequence[Step], xs: Sequence[float], gap: float) -> list[tuple[float, float, Dot]]:
    """A level beneath each step that has one and is not the base itself."""
    half = gap * 0.42
    return [
        (round(x - half, 1), round(x + half, 1), _dot(x, step.base, step._replace(digest=None)))
        for x, step in zip(xs, shown, strict=True) if step.base is not None and step.digest is not None
    ]  # fmt: skip


def _dot(x: float, found: Score, step: Step) -> Dot:
    who = step.digest[:10] if step.digest else "the base"
    interval, name = f"{100 * found.low:.1f} to {100 * found.high:.1f}", metric_name(step.metric or "").lower()
    told = f"{who}: {100 * found.rate:.1f} % ({interval}) by {name}, of {found.rows:,} held-out rows"
    return Dot(x, _y(found.rate), _y(found.low), _y(found.high), told, "back" if step.came_back else "")


def _y(share: float) -> float:
    return round(BOTTOM - share * (BOTTOM - TOP), 1)
