"""Two arms of one project's traffic over the same time: who accepts more tokens a step, who is faster.

Requests are shared out by a hash of their id, so the arms differ in nothing but the drafter; what a request happened to
draft with plays no part in where it is counted.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from services.store.speculation_log import Request

# Of the rates, so much is cut off at either end: one stalled request must not decide.
TRIMMED = 0.1
FEWEST = 5


class Ratio(NamedTuple):
    """Candidate over incumbent: the estimate and its interval. Without enough data everything is possible."""

    estimate: float = 1.0
    low: float = 0.0
    high: float = math.inf

    def evidence(self) -> list[float | None]:
        """[estimate, low, high], with nothing JSON cannot hold."""
        return [round(value, 4) if math.isfinite(value) else None for value in self]


class Comparison(NamedTuple):
    """`length`: tokens a step. `rate`: decode tokens/s. Both as candidate ÷ incumbent."""

    candidates: int
    incumbents: int
    length: Ratio
    rate: Ratio
    lengths: tuple[float, float]

    def evidence(self) -> dict[str, Any]:
        """For the deployment event."""
        return {
            "requests": [self.candidates, self.incumbents],
            "tokens_per_step": [round(value, 4) for value in self.lengths],
            "length_ratio": self.length.evidence(),
            "rate_ratio": self.rate.evidence(),
        }


def compare(candidate: Sequence[Request], incumbent: Sequence[Request], *, z: float) -> Comparison:
    """`z` is the interval's half width in standard errors."""
    lengths = (_mean_length(candidate), _mean_length(incumbent))
    rates = [[one.rate for one in arm if one.rate is not None] for arm in (candidate, incumbent)]
    return Comparison(
        len(candidate),
        len(incumbent),
        _ratio(_log_length(candidate), _log_length(incumbent), z),
        _ratio(_log_rate(rates[0]), _log_rate(rates[1]), z),
        lengths,
    )


class Logarithm(NamedTuple):
    """The logarithm of a mean, and that estimate's variance."""

    value: float
    variance: float


def _ratio(candidate: Logarithm | None, incumbent: Logarithm | None, z: float) -> Ratio:
    if candidate is None or incumbent is None:
        return Ratio()
    middle = candidate.value - incumbent.value
    reach = z * math.sqrt(candidate.variance + incumbent.variance)
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def _mean_length(arm: Sequence[Request]) -> float:
    steps = sum(one.steps for one in arm)
    return sum(one.tokens for one in arm) / steps if steps else 0.0


def _log_length(arm: Sequence[Request]) -> Logarithm | None:
    """A ratio of sums; its variance by the delta method, requests being the independent units."""
    if len(arm) < FEWEST:
        return None
    length, steps = _mean_length(arm), sum(one.steps for one in arm)
    squares = sum((one.tokens - length * one.steps) ** 2 for one in arm)
    return Logarithm(math.log(length), len(arm) / (len(arm) - 1) * squares / steps**2 / length**2)


def _log_rate(rates: Sequence[float]) -> Logarithm | None:
    """The trimmed mean, with the variance of the winsorized sample (Yuen 1974)."""
    if len(rates) < FEWEST:
        return None
    ordered = sorted(rates)
    cut = int(TRIMMED * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    winsorized = [kept[0]] * cut + kept + [kept[-1]] * cut
    mean, middle, n = fmean(kept), fmean(winsorized), len(ordered)
    variance = sum((value - middle) ** 2 for value in winsorized) / (n - 1) / ((1 - 2 * cut / n) ** 2 * n)
    return Logarithm(math.log(mean), variance / mean**2)
