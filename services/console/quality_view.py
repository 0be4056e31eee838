"""Live quality as pages show it: the estimate, its plot, and sentences for what is not known yet."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fastapi import Request

from services.console import charts
from services.console.access import Here
from services.console.memo import Memo
from services.store import power, quality
from services.store.quality import Counted, Estimate, Quality

# Half of the interval's width that the page plans labels for.
WANTED = 0.02


class Measured(NamedTuple):
    """The strata of the last 28 days, and what they say; kept for a while."""

    found: list[Counted]
    quality: Quality
    now: datetime


def measured(request: Request, here: Here) -> Measured:
    """From the memo the overview and the queue share."""
    memo: Memo[Measured] = request.app.state.quality
    return memo.get(here.project.id, lambda: _measure(here))


def _measure(here: Here) -> Measured:
    now = datetime.now(UTC)
    found = quality.strata(here.session, here.project.id, since=now - quality.LONGEST)
    return Measured(found, quality.quality(found, now), now)


def context(request: Request, here: Here) -> dict[str, Any]:
    """Everything `quality.html` uses."""
    known = measured(request, here)
    series = known.quality.series
    readings = _readings(series)
    return {
        "live_quality": known.quality.recent,
        "quality_in_words": in_words(known.quality),
        "quality_labels": labels_in_words(known.quality.recent),
        "quality_plot": charts.bands(
            [readings], series[0].since.timestamp(), series[-1].until.timestamp(), height=200
        ) if readings else None,
    }  # fmt: skip


def _readings(series: Sequence[quality.Point]) -> list[charts.Reading]:
    """In percent, each in the middle of its span."""
    return [
        charts.Reading(
            (point.since.timestamp() + point.until.timestamp()) / 2,
            100 * point.estimate.rate,
            100 * point.estimate.low,
            100 * point.estimate.high,
            point.estimate.labelled,
        )
        for point in series
        if point.estimate is not None
    ]


def in_words(known: Quality) -> str:
    """What the figure stands on, or why there is none."""
    found = known.recent
    if found is not None:
        return (
            f"of {found.population:,} answers of the last seven days were right as they stood: 95 % interval "
            f"{100 * found.low:.1f} to {100 * found.high:.1f} %, from {found.labelled:,} labels, each weighted by how "
            "many answers it speaks for."
        )
    if known.waiting:
        return (
            f"Not known yet: {known.unlabelled:,} strata of {known.waiting:,} windows have no label. One label in each "
            "stratum of a window is enough to begin."
        )
    return "Not known yet: it takes a closed time window, and a label in each of its strata."


def labels_in_words(found: Estimate | None) -> str:
    """How many labels would make the estimate as narrow as anybody decides by."""
    if found is None:
        return ""
    more = power.labels_for(found, WANTED)
    if more == 0:
        return f"Live quality is known to ±{100 * WANTED:.0f} points or better."
    return f"{more:,} more labels narrow live quality to ±{100 * WANTED:.0f} points."
