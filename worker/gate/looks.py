"""How often a gate may look at one held-out part: the level of each look, and why all of them together keep `alpha`.

Look k of a held-out part may spend alpha/(k(k+1)), which sums to alpha however often gates look. A look that ends in a
promotion hands its level on to the next one (online fallback: Tian and Ramdas, "Online control of the familywise error
rate", 2021, theorem 1), so good candidates cost nothing. The chance that any candidate is ever promoted wrongly on this
part stays at most alpha, whatever the dependence between candidates.

Candidates are chosen after earlier decisions on the same rows were seen. That is covered as far as choosing listens to
the decisions alone: before the first promotion there is one sequence of them (refuse, refuse, ...), so the candidates
are one fixed sequence too and the union bound holds for it (the argument of Blum and Hardt, "The Ladder", 2015).
"""

from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Budget:
    """The chance `alpha` of ever promoting wrongly on one held-out part."""

    alpha: float

    def level(self, look: int, carried: float = 0.0) -> float:
        """The level of the `look`-th look, what an earlier promotion handed on included. Raises ValueError."""
        if look < 1 or carried < 0:
            raise ValueError("looks are counted from 1, and no less than nothing is handed on")
        return self.alpha / (look * (look + 1)) + carried


def z_of(alpha: float) -> float:
    """The standard normal quantile that is exceeded with probability alpha."""
    return NormalDist().inv_cdf(1 - alpha)
