"""Is the split what it should be? Users who are missing from one arm make every comparison of the two worthless.

A sequential test that may be looked at after every user: the Bayes factor of a Beta prior around the configured share
against that share exactly (Lindon and Malek, "Anytime-valid inference for multinomial count data", 2022). It is a
martingale while the split is right, so it ever reaches 1/alpha with probability alpha at most (Ville).
"""

import math
from typing import NamedTuple

ALPHA = 0.001
# How close the prior stays to the configured share, in users.
PRIOR = 100.0


class Ratio(NamedTuple):
    """Users by arm, the share that was configured, and whether what came cannot be that split."""

    canary: int
    control: int
    share: float
    factor: float

    @property
    def off(self) -> bool:
        return self.factor >= 1 / ALPHA

    @property
    def seen(self) -> float | None:
        """The share that came."""
        total = self.canary + self.control
        return self.canary / total if total else None


def check(canary: int, control: int, share: float) -> Ratio:
    """`canary` and `control` are users seen so far in either arm."""
    one, other = PRIOR * share, PRIOR * (1 - share)
    logarithm = _log_beta(one + canary, other + control) - _log_beta(one, other)
    logarithm -= canary * math.log(share) + control * math.log1p(-share)
    return Ratio(canary, control, share, math.exp(min(logarithm, 700.0)))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
