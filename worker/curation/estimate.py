"""Live quality from reviewed items: the Horvitz–Thompson estimate over strata, with its interval.

Flagged items alone say nothing about traffic; each stratum speaks for its size, not for its number of labels.
"""

from collections.abc import Sequence
from datetime import datetime
from math import sqrt
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from services.store import reviews
from services.store.models import Annotation, ReviewItem
from worker.curation.strata import STAMP

Z95 = 1.959964


class Stratum(NamedTuple):
    """One stratum of one window: interactions in it, how many were judged, the sum of their scores in [0, 1]."""

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
    rate = sum(stratum.size * stratum.right / stratum.labelled for stratum in strata) / population
    spread = Z95 * sqrt(sum((stratum.size / population) ** 2 * _variance(stratum) for stratum in strata))
    return Estimate(rate, max(0.0, rate - spread), min(1.0, rate + spread), sum(s.labelled for s in strata), population)


def _variance(stratum: Stratum) -> float:
    """Of the stratum's mean. One right and one wrong are added (Agresti–Caffo), or three labels that agree would
    claim certainty; the last factor is for sampling without replacement."""
    guess = (stratum.right + 1) / (stratum.labelled + 2)
    return guess * (1 - guess) / stratum.labelled * (1 - stratum.labelled / stratum.size)


def estimate_quality(
    session: Session, project_id: UUID, *, since: datetime | None = None, until: datetime | None = None
) -> Estimate | None:
    """Of the windows that start in [since, until) and have labels in every stratum; windows nobody has come to yet
    are left out whole, which depends on the reviewers' pace and not on the answers. An item with several judgements
    counts their mean."""
    score = case((Annotation.verdict == "accept", 1.0), (Annotation.verdict.is_not(None), 0.0))
    item = (
        select(
            ReviewItem.window,
            ReviewItem.strategy,
            ReviewItem.stratum_size,
            func.avg(score).label("score"),
        )
        .outerjoin(
            Annotation,
            (Annotation.review_item_id == ReviewItem.id) & Annotation.verdict.in_(reviews.COUNTED) & reviews.standing(),
        )
        .where(ReviewItem.project_id == project_id, ReviewItem.strategy != "chosen")
        .group_by(ReviewItem.id)
    )
    if since is not None:
        item = item.where(ReviewItem.window >= since.strftime(STAMP))
    if until is not None:
        item = item.where(ReviewItem.window < until.strftime(STAMP))
    one = item.subquery()
    labelled, right = func.count(one.c.score), func.coalesce(func.sum(one.c.score), 0.0)
    rows = session.execute(
        select(one.c.window, func.max(one.c.stratum_size), labelled, right).group_by(one.c.window, one.c.strategy)
    )
    windows: dict[str, list[Stratum]] = {}
    for window, size, count, total in rows:
        windows.setdefault(window, []).append(Stratum(int(size), int(count), float(total)))
    return estimate([stratum for strata in windows.values() if estimate(strata) for stratum in strata])
