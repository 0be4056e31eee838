"""The gate for heads: a pure function of what they yield on held-out requests and of what drafting costs here.

Heads change no answer, so there is nothing to guard: they pass when more comes out of a step, surely and by enough to
be worth a swap, and when that more is not eaten up by drafting and verifying.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from worker.gate.statistics import Interval, bootstrap, cluster

ALPHA = 0.025
LEAST_GAIN = 0.02
LEAST_REQUESTS = 20
# So few groups are no sample of the users; an app that names one user for all has no others.
LEAST_GROUPS = 5
# Streams at once for which goodput is predicted: one user, and a busy engine.
LOADS = (1, 16)
# Timings of equal heads differ by this much.
TOLERANCE = 0.01


class Held(NamedTuple):
    """One held-out request: tokens a step under the candidate, and under the incumbent (1 where none drafts)."""

    group: str
    candidate: float
    incumbent: float


@dataclass(frozen=True)
class Drafter:
    """Heads as a step sees them: `survival[k]` is how often the first k + 1 drafts are all right, `milliseconds` what
    one head takes to draft for a batch of so many rows."""

    survival: Sequence[float]
    milliseconds: dict[int, float]


class Cost(NamedTuple):
    """Milliseconds of a step of so many tokens in so many rows."""

    rows: int
    tokens: int
    milliseconds: float


@dataclass(frozen=True)
class Verdict:
    """What was decided and on which figures. `goodput` holds tokens a second for each load under both."""

    promote: bool
    reasons: list[str]
    gain: float
    interval: Interval
    goodput: dict[int, tuple[float, float]]


def judge(
    held: Sequence[Held], candidate: Drafter, incumbent: Drafter | None, costs: Sequence[Cost], *, seed: int = 0
) -> Verdict:
    """Compare heads with what drafts now (None: nothing but what needs no training)."""
    if len(held) < LEAST_REQUESTS:
        reason = f"{len(held)} held-out requests are too few to judge by; it takes {LEAST_REQUESTS}"
        return Verdict(False, [reason], 0.0, Interval(0.0, 0.0), {})
    before = fmean(row.incumbent for row in held)
    groups = [row.group for row in held]
    if len(set(groups)) < LEAST_GROUPS:
        groups = [str(place) for place in range(len(held))]
    clusters = cluster([row.candidate - row.incumbent for row in held], groups)
    low, high = bootstrap(clusters, ALPHA, seed=seed)
    gain, interval = clusters.mean / before, Interval(low / before, high / before)
    goodput = {load: _goodputs(load, candidate, incumbent, costs) for load in LOADS} if costs else {}
    good, bad = _on_yield(gain, interval, len(held)), _on_goodput(goodput, incumbent)
    reasons = [*good.against, *bad.against, *good.favour, *bad.favour]
    return Verdict(not (good.against or bad.against), reasons, gain, interval, goodput)


@dataclass(frozen=True)
class _Findings:
    favour: list[str]
    against: list[str]


def _on_yield(gain: float, interval: Interval, requests: int) -> _Findings:
    figures = f"{100 * gain:+.1f} % [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}] over {requests} requests"
    if interval.low <= 0:
        return _Findings([], [f"not shown to yield more tokens a step: {figures}"])
    if gain < LEAST_GAIN:
        return _Findings([], [f"a gain below {100 * LEAST_GAIN:g} % is not worth a swap: {figures}"])
    return _Findings([f"more tokens come out of a step: {figures}"], [])


def _on_goodput(goodput: dict[int, tuple[float, float]], incumbent: Drafter | None) -> _Findings:
    found = _Findings([], [])
    for load, (ours, theirs) in goodput.items():
        streams = "one stream" if load == 1 else f"{load} streams"
        figures = f"{ours:.0f} tokens/s against {theirs:.0f} predicted for {streams}"
        if ours < (1 - TOLERANCE) * theirs:
            found.against.append(f"slower in spite of it: {figures}")
        elif load == 1 and incumbent is None and ours <= (1 + TOLERANCE) * theirs:
            found.against.append(f"drafting and verifying cost what they bring: {figures}")
        else:
            found.favour.append(f"fast enough: {figures}")
    return found


def _goodputs(load: int, candidate: Drafter, incumbent: Drafter | None, costs: Sequence[Cost]) -> tuple[float, float]:
    nothing = Drafter((), {})
    return goodput(load, candidate, costs), goodput(load, incumbent or nothing, costs)


def goodput(rows: int, drafter: Drafter, costs: Sequence[Cost]) -> float:
    """Tokens a second that so many rows get at the best number of drafts, none included."""
    best, alive = rows / step_ms(rows, rows, costs), 1.0
    for count, chance in enumerate(drafter.survival, start=1):
        alive += chance
        spent = step_ms(rows, rows * (1 + count), costs) + count * drafting_ms(rows, drafter)
        best = max(best, rows * alive / spent)
    return 1000 * best


def step_ms(rows: int, tokens: int, costs: Sequence[Cost]) -> float:
    """A step of so many tokens, by what was measured with the likest number of rows: linear between two sizes, and
    beyond the last by its slope."""
    likest = min((cost.rows for cost in costs), key=lambda known: max(known / rows, rows / known))
    points = sorted(cost for cost in costs if cost.rows == likest)
    if tokens <= points[0].tokens or len(points) == 1:
        return points[0].milliseconds
    after = next((place for place, point in enumerate(points) if point.tokens >= tokens), len(points) - 1)
    left, right = points[after - 1], points[after]
    slope = (right.milliseconds - left.milliseconds) / (right.tokens - left.tokens)
    return max(left.milliseconds + slope * (tokens - left.tokens), points[0].milliseconds)


def drafting_ms(rows: int, drafter: Drafter) -> float:
    """One head for so many rows: the nearest larger measurement, or the largest."""
    sizes = sorted(drafter.milliseconds)
    return drafter.milliseconds[next((size for size in sizes if size >= rows), sizes[-1])] if sizes else 0.0
