"""How many labels a decision needs, told before anyone labels."""

from math import ceil, sqrt
from statistics import NormalDist

from services.store.evaluation_config import ALPHA
from services.store.quality import Estimate

POWER = 0.8
# Share of pairs whose two answers score differently, while no comparison has measured it.
ASSUMED_DISCORDANT = 0.1


def pairs_needed(drop: float, spread: float, *, look: int = 1, carried: float = 0.0, power: float = POWER) -> int:
    """Held-out pairs with which the gate sees a drop of `drop` (0.02 is two points) with the given power.

    `spread` is the standard deviation of one pair's difference. Raises ValueError for figures that
    make no sense.
    """
    if not 0 < drop <= 1 or spread < 0 or look < 1 or not 0 < power < 1:
        raise ValueError("a drop is in (0, 1], a spread at least 0, looks are counted from 1, power is in (0, 1)")
    normal = NormalDist()
    quantiles = normal.inv_cdf(1 - level(look, carried)) + normal.inv_cdf(power)
    return ceil((quantiles * spread / drop) ** 2)


def level(look: int, carried: float) -> float:
    """The gate's own rule (`worker/gate/looks.py`): the one-sided bound of look k spends ALPHA/(k(k+1)) and what a
    promotion handed on."""
    return ALPHA / (look * (look + 1)) + carried


def spread_of(discordant: float, drop: float = 0.0) -> float:
    """Standard deviation of a pair's difference in {-1, 0, 1} where a share of the pairs differs (Connor 1987)."""
    return sqrt(max(0.0, discordant - drop * drop))


def labels_for(known: Estimate, half_width: float) -> int:
    """More labels until live quality is known to ± `half_width`, labelled in the same proportions."""
    have = (known.high - known.low) / 2
    return 0 if have <= half_width else ceil(known.labelled * ((have / half_width) ** 2 - 1))
