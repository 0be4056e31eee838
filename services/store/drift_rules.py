"""Has something drifted? Pure functions of what was counted, with limits from `benchmarks.drift_simulation`.

Quality: the live estimates of two stretches of time, compared by MOVER. Input: the population stability index between
what was asked before and what is asked now. An index of 0.2 is what practitioners act on; where a project's own days
differ that much among themselves, it takes more than twice their difference.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import log, sqrt
from typing import NamedTuple

from services.store.quality import Z95, Estimate

# Looked at daily for months: far beyond the 1.64 of a single look.
Z_DROP = 3.0
LEAST_LABELS = 60
SHIFT = 0.2
DAYS_APART = 2.0  # times the largest index between one of the days before and the rest of them
LEAST_DAYS = 3
LEAST_PROMPTS = 300
QUANTILES = 10
NAMED_MOST = 19
TAG_VALUES = 9
TAG_SHARE, TAG_COVERED = 0.2, 0.5

OTHER, NONE = "\0other", "\0none"


class Prompt(NamedTuple):
    """What is looked at of one request: its length in tokens, how its last turn begins, and its tags."""

    length: int
    opening: str
    tags: Mapping[str, str]


class Shift(NamedTuple):
    """A feature whose distribution has moved: its index, and the limit it is beyond."""

    feature: str
    moved_by: float
    limit: float


class Drop(NamedTuple):
    """Live quality before and now; `low` and `high` are a 99.7 % interval of the difference."""

    before: float
    now: float
    low: float
    high: float


def dropped(before: Estimate | None, now: Estimate | None) -> Drop | None:
    """None unless the whole interval of the difference is below 0, from LEAST_LABELS labels on both sides."""
    if before is None or now is None or min(before.labelled, now.labelled) < LEAST_LABELS:
        return None
    scale, delta = Z_DROP / Z95, now.rate - before.rate
    low = delta - scale * sqrt((now.rate - now.low) ** 2 + (before.high - before.rate) ** 2)
    high = delta + scale * sqrt((now.high - now.rate) ** 2 + (before.rate - before.low) ** 2)
    return Drop(before.rate, now.rate, low, high) if high < 0 else None


def moved(before: Sequence[Sequence[Prompt]], now: Sequence[Prompt]) -> Shift | None:
    """The feature beyond its limit by most, of the days `before` against `now`. None where too little was asked."""
    pooled = [prompt for day in before for prompt in day]
    if min(len(pooled), len(now)) < LEAST_PROMPTS:
        return None
    found = [shift for name, bin_of in features(pooled).items() if (shift := _shift(name, bin_of, before, now))]
    return max(found, key=lambda shift: shift.moved_by / shift.limit, default=None)


def _shift(
    name: str, bin_of: Callable[[Prompt], str], before: Sequence[Sequence[Prompt]], now: Sequence[Prompt]
) -> Shift | None:
    days = [Counter(map(bin_of, day)) for day in before if day]
    index = stability(sum(days, Counter()), Counter(map(bin_of, now)))
    limit = max(SHIFT, DAYS_APART * apart(days))
    return Shift(name, index, limit) if index > limit else None


def apart(days: Sequence[Counter[str]]) -> float:
    """How far a project's days are from one another: the largest index of one against the rest."""
    if len(days) < LEAST_DAYS:
        return 0.0
    whole: Counter[str] = sum(days, Counter())
    return max(stability(whole - day, day) for day in days)


def stability(before: Counter[str], now: Counter[str]) -> float:
    """Population stability index: the symmetric divergence of two distributions over bins (Siddiqi 2006).

    Half a prompt is added to every bin, and what sampling alone would give, (bins − 1)(1/n + 1/m), is taken off.
    """
    bins = sorted(before.keys() | now.keys())
    if len(bins) < 2 or not before or not now:
        return 0.0
    n, m = before.total(), now.total()
    index = 0.0
    for name in bins:
        p = (before[name] + 0.5) / (n + 0.5 * len(bins))
        q = (now[name] + 0.5) / (m + 0.5 * len(bins))
        index += (q - p) * log(q / p)
    return max(0.0, index - (len(bins) - 1) * (1 / n + 1 / m))


# --- bins -------------------------------------------------------------------------------------------------


def features(before: Sequence[Prompt]) -> dict[str, Callable[[Prompt], str]]:
    """What is compared, each with the bin of a prompt; the bins are those of what was asked before."""
    found: dict[str, Callable[[Prompt], str]] = {
        "length": _lengths([prompt.length for prompt in before]),
        "opening": _named([prompt.opening for prompt in before], lambda prompt: prompt.opening, NAMED_MOST),
    }
    tagged = Counter(name for prompt in before for name in prompt.tags)
    for name, count in tagged.items():
        values = Counter(prompt.tags[name] for prompt in before if name in prompt.tags)
        common = sum(times for _, times in values.most_common(TAG_VALUES))
        # A tag that is different for everybody is an id, and says nothing of what is asked.
        if count >= TAG_SHARE * len(before) and common >= TAG_COVERED * count:
            found[f"tag {name}"] = _named(list(values.elements()), _tag(name), TAG_VALUES)
    return found


def _tag(name: str) -> Callable[[Prompt], str]:
    return lambda prompt: prompt.tags.get(name, NONE)


def _lengths(lengths: Sequence[int]) -> Callable[[Prompt], str]:
    ordered = sorted(lengths)
    cuts = sorted({ordered[len(ordered) * place // QUANTILES] for place in range(1, QUANTILES)})
    return lambda prompt: str(sum(prompt.length >= cut for cut in cuts))


def _named(values: Sequence[str], of: Callable[[Prompt], str], most: int) -> Callable[[Prompt], str]:
    kept = {value for value, _ in Counter(values).most_common(most)} | {NONE}

    def bin_of(prompt: Prompt) -> str:
        value = of(prompt)
        return value if value in kept else OTHER

    return bin_of
