"""Intervals for the difference of two arms that hold however often somebody looks, for requests that come from users.

Outcomes of one user resemble one another, so the user is the unit: each has a weight w (requests, up to a cap) and y, w
times the mean outcome. The boundary is that of an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy
and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", 2021): the normal mixture
sqrt((1 + 1/m) log((1 + m) / alpha^2)) in standard errors. Its clock is the cluster-robust variance of the sums. A user
may say more later on: then what is known at two moments is at least as correlated as a Brownian motion on that clock
would be, so by Slepian's inequality it crosses the boundary no more often than that does.

Three things keep small samples honest: the standard error is the larger of each arm's own and the one it would have if
both were alike; shares have the variance of two more successes and failures than were seen; and a t distribution's
tail replaces the normal one's, on as many degrees of freedom as there are effective users.
"""

import math
from typing import NamedTuple

from services.store.rollout_counts import Arms, Moments

# Candidate's weight at which the boundary is tightest; it loses little far around.
TUNED = 250.0
# The optimum of the mixture for alpha = 0.05 (equation 10 of the paper's appendix on tuning).
MIXTURE = 7.9


class Interval(NamedTuple):
    """The candidate's mean less the other's, with a two-sided interval; `error` is the standard error."""

    estimate: float
    low: float
    high: float
    error: float


def difference(arms: Arms, alpha: float, *, share: bool) -> Interval | None:
    """None while an arm has fewer than two users. `share` says that outcomes lie in [0, 1]."""
    canary, control = arms
    if canary.users < 2 or control.users < 2:
        return None
    pooled = _pooled_variance(canary, control, share=share)
    one = max(_own_variance(canary, share=share), pooled / canary.w)
    other = max(_own_variance(control, share=share), pooled / control.w)
    variance = one + other
    if variance <= 0:
        return None
    # Welch and Satterthwaite, on the users that each arm effectively has.
    spread = one**2 / max(1.0, _effective_users(canary) - 1) + other**2 / max(1.0, _effective_users(control) - 1)
    error = math.sqrt(variance)
    estimate = canary.y / canary.w - control.y / control.w
    reach = error * heavier(boundary(canary.w, alpha), variance**2 / spread)
    return Interval(estimate, estimate - reach, estimate + reach, error)


def boundary(weight: float, alpha: float) -> float:
    """Standard errors that a Brownian motion leaves with probability `alpha`, ever."""
    mixture = weight * MIXTURE / TUNED
    return math.sqrt((1 + 1 / mixture) * math.log((1 + mixture) / alpha**2))


def heavier(normal: float, freedom: float) -> float:
    """The quantile of Student's t where the normal distribution has `normal` (Cornish-Fisher, three terms)."""
    z, v = normal, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def _own_variance(arm: Moments, *, share: bool) -> float:
    """Of the mean, from how far its users lie apart."""
    mean = arm.y / arm.w
    squares = arm.yy - 2 * mean * arm.yw + mean**2 * arm.ww
    found = max(0.0, squares) * arm.users / (arm.users - 1) / arm.w**2
    return max(found, _least_variance(arm.y, arm.w) / arm.w) if share else found


def _pooled_variance(one: Moments, other: Moments, *, share: bool) -> float:
    """Of a mean of weight 1, were both arms alike."""
    weight, total = one.w + other.w, one.y + other.y
    mean = total / weight
    squares = one.yy + other.yy - 2 * mean * (one.yw + other.yw) + mean**2 * (one.ww + other.ww)
    found = max(0.0, squares) / weight
    return max(found, _least_variance(total, weight)) if share else found


def _least_variance(total: float, weight: float) -> float:
    """Of one outcome: where nobody has failed yet, or everybody has, the next one still may not."""
    near = (min(total, weight - total) + 2) / (weight + 4)
    return near * (1 - near)


def _effective_users(arm: Moments) -> float:
    """How many users of equal weight would tell as much."""
    return arm.w**2 / arm.ww
