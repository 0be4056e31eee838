"""The bootstrap distribution of a clustered mean in closed form, exact enough for levels no resampling reaches.

Look 20 on a held-out part may spend 0.0001. Ten thousand resamples have one value below that, and their number is a
new one with every seed. The saddlepoint approximation to the same distribution (Davison and Hinkley, "Saddlepoint
approximations in resampling methods", Biometrika 1988, with the tail formula r* of Lugannani and Rice 1980 in
Barndorff-Nielsen's form) has a relative error of a few percent out there, no seed, and takes under a millisecond.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from worker.gate.statistics import Clusters, Interval

Floats = NDArray[np.float64]
STEPS = 60
CLOSE = 1e-9
# Below this the tail formula divides nothing by nothing; its limit is used.
FLAT = 1e-4


class Support(NamedTuple):
    """Distinct clusters: sum and rows of each sort, and the share of clusters that are of it."""

    sums: Floats
    sizes: Floats
    shares: Floats
    clusters: int


def bounds(clusters: Clusters, alpha: float) -> Interval:
    """One-sided percentile bounds of the mean difference at level `alpha` each, differences being in [-1, 1].

    One winning and one losing cluster are added, of average size and of the difference that those which differ have (as
    Agresti-Min add a pair each way to paired proportions): resampling four wins and ninety-six ties alone would be sure
    of a gain that a coin gives one time in sixteen, and six winning groups of forty are four wins again. Few clusters
    widen the interval as Student's t does ("expanded percentiles", Hesterberg, The American Statistician 2015).
    """
    support = summarise(clusters)
    z = float(student.isf(alpha, support.clusters - 1)) * math.sqrt(support.clusters / (support.clusters - 1))
    mean = float(support.shares @ support.sums / (support.shares @ support.sizes))
    residuals = support.sums - mean * support.sizes
    error = math.sqrt(float(support.shares @ residuals**2) / support.clusters) / float(support.shares @ support.sizes)
    return Interval(_solve(support, -z, mean - z * error, mean), _solve(support, z, mean + z * error, mean))


def summarise(clusters: Clusters) -> Support:
    """Clusters by what they are; the two added ones included."""
    size = float(clusters.sizes.mean())
    differing = clusters.sums[np.abs(clusters.sums) > CLOSE]
    typical = math.sqrt(float((differing**2).mean())) if len(differing) else size
    sums, sizes = np.append(clusters.sums, [typical, -typical]), np.append(clusters.sizes, [size, size])
    pairs = np.column_stack([sums, sizes])
    if np.ptp(pairs[:, 1]) == 0:  # sorting plain numbers is ten times as fast as sorting rows
        values, counts = np.unique(pairs[:, 0], return_counts=True)
        kinds = np.column_stack([values, np.full(len(values), pairs[0, 1])])
    else:
        kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    return Support(kinds[:, 0], kinds[:, 1], counts / len(pairs), len(pairs))


def quantile_of(support: Support, x: float) -> float:
    """The standard normal quantile of P(resampled mean <= x); infinite where no resample can be on one side."""
    residuals = support.sums - x * support.sizes
    low, high = float(residuals.min()), float(residuals.max())
    if low >= 0:
        return -math.inf
    if high <= 0:
        return math.inf
    tilt = _tilt(support.shares, residuals)
    cumulant, _, variance, skew = _cumulants(support.shares, residuals, tilt)
    root = math.copysign(math.sqrt(max(0.0, -2 * support.clusters * cumulant)), tilt)
    if abs(root) < FLAT:
        return root + skew / (6 * math.sqrt(support.clusters))
    return root + math.log(tilt * math.sqrt(support.clusters * variance) / root) / root


def _solve(support: Support, wanted: float, start: float, mean: float) -> float:
    """Where the quantile is `wanted`: secants, which a nearly straight line makes few, kept inside a bracket."""
    low, high = (-1.0, mean) if wanted < 0 else (mean, 1.0)
    x, before = min(max(start, low + CLOSE), high - CLOSE), mean
    value_before = quantile_of(support, before) - wanted
    for _ in range(STEPS):
        value = quantile_of(support, x) - wanted
        low, high = (x, high) if value < 0 else (low, x)
        slope = (value - value_before) / (x - before) if math.isfinite(value) and x != before else math.nan
        step = x - value / slope if slope > 0 else math.nan
        following = step if low < step < high else (low + high) / 2
        before, value_before = x, value
        if abs(following - x) < CLOSE:
            break
        x = following
    return x


def _tilt(shares: Floats, residuals: Floats) -> float:
    """Where the tilted mean of the residuals is zero: Newton, halved towards the side it must be on."""
    mean = float(shares @ residuals)
    tilt = -mean / float(shares @ (residuals - mean) ** 2)
    low, high = (-math.inf, 0.0) if mean > 0 else (0.0, math.inf)
    for _ in range(STEPS):
        _, slope, variance, _ = _cumulants(shares, residuals, tilt)
        low, high = (low, tilt) if slope > 0 else (tilt, high)
        following = tilt - slope / variance if variance > 0 else math.nan
        if not low < following < high:
            following = 2 * tilt if math.isinf(low) or math.isinf(high) else (low + high) / 2
        if abs(following - tilt) <= CLOSE * (1 + abs(tilt)):
            return following
        tilt = following
    return tilt


def _cumulants(shares: Floats, residuals: Floats, tilt: float) -> tuple[float, float, float, float]:
    """Cumulant function of one residual at `tilt`, its first two derivatives, and the skewness there."""
    exponents = tilt * residuals
    top = float(exponents.max())
    weights = shares * np.exp(exponents - top)
    total = float(weights.sum())
    weights /= total
    mean = float(weights @ residuals)
    centred = residuals - mean
    squares = centred * centred
    variance = float(weights @ squares)
    third = float(weights @ (squares * centred))
    return top + math.log(total), mean, variance, third / variance**1.5 if variance > 0 else 0.0
