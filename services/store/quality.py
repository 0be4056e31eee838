"""Live quality from reviewed items: a stratified estimate of the share of right answers, with its 95 % interval.

Flagged items alone say nothing about traffic; each stratum speaks for its size, not for its number of labels. The
point estimate is Horvitz–Thompson's with the realised probabilities, labelled ÷ size of a stratum. (It is the
prediction-powered estimate whose predictor is the stratum's mean: strata are made from the same signals that a
predictor would use.)

The interval is not the estimate ± 1.96 standard errors: at 2 % failures that covers the truth one time in two,
because strata without a failure among their labels claim certainty. Each strategy gets Wilson's limits (JASA 1927) at
its effective number of labels, and MOVER (Zou & Donner, Statistics in Medicine 2008) puts the limits together. The
windows of a strategy are pooled, as strata with one label have no variance of their own (collapsed strata: Cochran,
Sampling Techniques, 5A.12); what differs between windows only makes it wider. Korn–Graubard's interval, which scales
all labels by one design effect, was as far off as the normal one: `python -m benchmarks.sampling_simulation` compares.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from math import sqrt
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.orm import Session

from services.store import reviews
from services.store.models import Annotation, ReviewItem
from services.store.sampling import CHOSEN, PRECEDENCE, STAMP

Z95 = 1.959964
LONGEST = timedelta(days=28)
RECENT = timedelta(days=7)
SPANS = 14


class Stratum(NamedTuple):
    """One stratum of one window: interactions in it, how many were judged, the sum of their scores in [0, 1]."""

    strategy: str
    size: int
    labelled: int
    right: float


class Estimate(NamedTuple):
    """Share of the traffic whose answer was right as it stood, with a 95 % interval."""

    rate: float
    low: float
    high: float
    labelled: int
    population: int


def estimate(strata: Sequence[Stratum]) -> Estimate | None:
    """Sum of score/π over the labelled ones, π = labelled/size: the size-weighted mean of the strata's means.

    None until every stratum has labels: one that nobody looked at could hold anything.
    """
    if not strata or any(stratum.labelled == 0 for stratum in strata):
        return None
    population = sum(stratum.size for stratum in strata)
    rate = below = above = 0.0
    for pooled in _by_strategy(strata):
        size = sum(stratum.size for stratum in pooled)
        weight, mean = size / population, sum(s.size * s.right / s.labelled for s in pooled) / size
        low, high = wilson(mean, _unit_variance(pooled, size))
        rate += weight * mean
        below += (weight * (mean - low)) ** 2
        above += (weight * (high - mean)) ** 2
    low, high = max(0.0, rate - sqrt(below)), min(1.0, rate + sqrt(above))
    return Estimate(rate, low, high, sum(stratum.labelled for stratum in strata), population)


def _by_strategy(strata: Iterable[Stratum]) -> Iterable[list[Stratum]]:
    pooled: dict[str, list[Stratum]] = {}
    for stratum in strata:
        pooled.setdefault(stratum.strategy, []).append(stratum)
    return pooled.values()


def _unit_variance(pooled: Sequence[Stratum], size: int) -> float:
    """Variance of the pooled mean over that of one label, drawn without replacement: 1 ÷ effective labels."""
    return sum((s.size / size) ** 2 * (1 - s.labelled / s.size) / s.labelled for s in pooled)


def wilson(mean: float, unit_variance: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's limits of a proportion; `unit_variance` is 1 ÷ (effective) labels, 0 where all were labelled."""
    spread = z * z * unit_variance
    centre = (mean + spread / 2) / (1 + spread)
    half = sqrt(spread * (max(0.0, mean * (1 - mean)) + spread / 4)) / (1 + spread)
    return centre - half, centre + half


# --- from the queue ---------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """A stratum of one window in the queue; `queued` items of it were chosen for review."""

    window: str
    stratum: Stratum
    queued: int


class Point(NamedTuple):
    """The estimate of the windows that began in [since, until); None while one of their strata has no label."""

    since: datetime
    until: datetime
    estimate: Estimate | None


class Quality(NamedTuple):
    """Live quality over RECENT, and over time. `unlabelled` strata of `waiting` recent windows have no label yet."""

    recent: Estimate | None
    series: list[Point]
    waiting: int
    unlabelled: int


def counted() -> ColumnElement[bool]:
    """Judgements that count: they stand, and were not given to test the reviewer."""
    return Annotation.verdict.in_(reviews.COUNTED) & reviews.standing()


def sampled() -> ColumnElement[bool]:
    """Items that are in a stratum of a window: what the sampler chose, and what people had put in the queue by hand
    before the window closed. What they put there later has no probability, and says nothing of the rest."""
    return ReviewItem.strategy.in_(PRECEDENCE) | ((ReviewItem.strategy == CHOSEN) & (ReviewItem.window != ""))


def score() -> ColumnElement[float]:
    """1 for an answer left as it was: accepted, or in a pair not put behind the other one."""
    preferred = (Annotation.verdict == "prefer") & Annotation.preference.in_(("response", "tie"))
    return case(((Annotation.verdict == "accept") | preferred, 1.0), else_=0.0)


def _item_score() -> ColumnElement[float]:
    """The mean of an item's judgements; where a lead has settled a dispute, what the lead said."""
    return func.coalesce(func.avg(score()).filter(Annotation.adjudicates), func.avg(score()))


def strata(
    session: Session, project_id: UUID, *, since: datetime | None = None, until: datetime | None = None
) -> list[Counted]:
    """The strata of the windows that start in [since, until). An item with several judgements counts their mean."""
    judged = (
        select(Annotation.review_item_id, _item_score().label("score"))
        .where(Annotation.project_id == project_id, counted())
        .group_by(Annotation.review_item_id)
    )
    item = select(ReviewItem.window, ReviewItem.strategy, ReviewItem.stratum_size, ReviewItem.id).where(
        ReviewItem.project_id == project_id, sampled()
    )
    if since is not None:
        item = item.where(ReviewItem.window >= since.strftime(STAMP))
        judged = judged.where(Annotation.created_at >= since)  # nobody judges before the window has closed
    if until is not None:
        item = item.where(ReviewItem.window < until.strftime(STAMP))
    one, said = item.subquery(), judged.subquery()
    rows = session.execute(
        select(
            one.c.window, one.c.strategy, func.max(one.c.stratum_size), func.count(), func.count(said.c.score),
            func.coalesce(func.sum(said.c.score), 0.0),
        )
        .outerjoin_from(one, said, said.c.review_item_id == one.c.id)
        .group_by(one.c.window, one.c.strategy)
        .order_by(one.c.window)
    )  # fmt: skip
    return [
        Counted(window, Stratum(strategy, int(size), int(labelled), float(right)), int(queued))
        for window, strategy, size, queued, labelled, right in rows
    ]


def estimate_of(found: Sequence[Counted]) -> Estimate | None:
    """Of the windows that have labels in every stratum. Windows nobody has come to yet are left out whole, which
    depends on the reviewers' pace and not on the answers."""
    windows: dict[str, list[Stratum]] = {}
    for row in found:
        windows.setdefault(row.window, []).append(row.stratum)
    ready = [one for one in windows.values() if all(stratum.labelled for stratum in one)]
    return estimate([stratum for one in ready for stratum in one])


def estimate_quality(
    session: Session, project_id: UUID, *, since: datetime | None = None, until: datetime | None = None
) -> Estimate | None:
    """Live quality of the windows that start in [since, until)."""
    return estimate_of(strata(session, project_id, since=since, until=until))


def quality(found: Sequence[Counted], now: datetime) -> Quality:
    """Live quality as the overview shows it, from the strata of the last LONGEST."""
    starts = {label: _start(label) for label in {row.window for row in found}}
    first = min(starts.values(), default=now)
    since = min(max(first, now - LONGEST), now - timedelta(minutes=1))
    step = (now - since) / SPANS
    spans: list[list[Counted]] = [[] for _ in range(SPANS)]
    for row in found:
        if since <= starts[row.window] < now:
            spans[min(SPANS - 1, int((starts[row.window] - since) / step))].append(row)
    series = [Point(since + step * k, since + step * (k + 1), estimate_of(rows)) for k, rows in enumerate(spans)]
    recent = [row for row in found if starts[row.window] >= now - RECENT]
    empty = [row for row in recent if not row.stratum.labelled]
    return Quality(estimate_of(recent), series, len({row.window for row in empty}), len(empty))


def _start(window: str) -> datetime:
    return datetime.strptime(window.split("/")[0], STAMP).replace(tzinfo=UTC)
