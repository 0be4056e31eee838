"""How far reviewers agree beyond chance: Krippendorff's alpha over verdicts, with a bootstrap interval.

Nominal data, any number of judges, missing judgements allowed: Krippendorff, "Computing Krippendorff's
Alpha-Reliability" (2011), section D. Adjudications are left out: whoever settles a dispute has seen both sides.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from services.store import reviews
from services.store.models import Annotation

RESAMPLES = 2000
SEED = 20110125
LEVEL = 0.95


class Agreement(NamedTuple):
    """Alpha (1 perfect, 0 chance, below 0 worse than chance) and its 95 % interval."""

    value: float
    low: float
    high: float
    items: int
    judgements: int


def alpha(session: Session, project_id: UUID) -> Agreement | None:
    """Of a project's items that two people or more have judged; None where that says nothing (see `of_units`)."""
    label = _label()
    units = (
        select(func.array_agg(label.op("ORDER BY")(label)).label("labels"))
        .where(
            Annotation.project_id == project_id,
            Annotation.verdict.in_(reviews.COUNTED),
            reviews.standing(),
            ~Annotation.adjudicates,
        )
        .group_by(Annotation.review_item_id)
        .having(func.count() > 1)
        .subquery()
    )
    counted = session.execute(select(units.c.labels, func.count()).group_by(units.c.labels))
    return of_units({tuple(row[0]): row[1] for row in counted})


def _label() -> ColumnElement[str]:
    """A pair's verdict is which side was preferred."""
    return func.coalesce(Annotation.preference, Annotation.verdict)


def of_units(units: Mapping[tuple[Hashable, ...], int], *, resamples: int = RESAMPLES) -> Agreement | None:
    """Alpha from how often each combination of labels was given to a unit; units with one label count for nothing.

    None when no unit has two labels or when only one label was ever given: alpha is not defined then. The interval is
    a percentile bootstrap over units with a fixed seed, so that a page shows the same figure twice.
    """
    paired = {labels: count for labels, count in units.items() if len(labels) > 1 and count > 0}
    if not paired:
        return None
    labels = sorted({label for unit in paired for label in unit}, key=str)
    numbers = np.array(list(paired.values()), dtype=np.int64)
    values, disagreed = _units(list(paired), labels)
    value = _alpha(numbers[None], values, disagreed)[0]
    if np.isnan(value):
        return None
    total = int(numbers.sum())
    drawn = np.random.default_rng(SEED).multinomial(total, numbers / total, size=resamples)
    spread = _alpha(drawn, values, disagreed)
    spread = spread[~np.isnan(spread)]
    edge = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(spread, [edge, 100 - edge]) if len(spread) else (value, value)
    judgements = int(numbers @ values.sum(axis=1))
    return Agreement(float(value), float(min(low, value)), float(max(high, value)), total, judgements)


def _units(
    patterns: Sequence[tuple[Hashable, ...]], labels: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per pattern: how often it holds each label, and its disagreeing ordered pairs over (labels - 1)."""
    values = np.zeros((len(patterns), len(labels)))
    for place, pattern in enumerate(patterns):
        for label, count in Counter(pattern).items():
            values[place, labels.index(label)] = count
    size = values.sum(axis=1)
    return values, (size**2 - (values**2).sum(axis=1)) / (size - 1)


def _alpha(
    numbers: NDArray[np.int64], values: NDArray[np.float64], disagreed: NDArray[np.float64]
) -> NDArray[np.float64]:
    """1 - observed / expected disagreement, for each row of `numbers` (resamples by patterns); NaN where undefined."""
    margins = numbers @ values
    total = margins.sum(axis=1)
    expected = total**2 - (margins**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = np.where(expected > 0, 1 - (total - 1) * (numbers @ disagreed) / expected, np.nan)
    return found
