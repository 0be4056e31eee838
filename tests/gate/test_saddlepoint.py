"""Bounds in closed form: those of plain resampling, right where resampling cannot reach, and never wider awake."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from worker.gate.looks import Budget
from worker.gate.saddlepoint import bounds, quantile_of, summarise
from worker.gate.statistics import Clusters, bootstrap


def of(wins: int, losses: int, ties: int) -> Clusters:
    """Independent rows with these outcomes."""
    sums = np.array([1.0] * wins + [-1.0] * losses + [0.0] * ties)
    return Clusters(sums, np.ones(len(sums)))


def clustered(seed: int, groups: int) -> Clusters:
    """Groups of 1 to 9 rows with graded differences that go together."""
    dice = np.random.default_rng(seed)
    sizes = dice.integers(1, 10, groups).astype(float)
    return Clusters(sizes * dice.choice([-0.5, 0.0, 0.25, 1.0], groups), sizes)


@pytest.mark.parametrize(
    "clusters", [of(60, 30, 510), of(20, 5, 75), of(10, 0, 90), clustered(1, 120), clustered(2, 400)]
)
@pytest.mark.parametrize("alpha", [0.1, 0.025, 0.005])
def test_the_bounds_are_those_of_resampling(clusters: Clusters, alpha: float) -> None:
    exact, drawn = bounds(clusters, alpha), bootstrap(clusters, alpha, seed=1)
    error = clusters.spread / math.sqrt(len(clusters.sums))

    # A resampled mean of whole rows moves in steps of 1 / rows, and few groups are widened here and not there.
    step = 1 / clusters.sizes.sum() + 0.02 * error * 3
    assert exact.low == pytest.approx(drawn.low, abs=0.1 * error + step)
    assert exact.high == pytest.approx(drawn.high, abs=0.1 * error + step)


def test_the_tail_of_a_coin_is_the_binomial_one_far_out() -> None:
    """200 clusters of +1 and -1: the chance that a resample's wins are at most half is a binomial one."""
    support = summarise(of(129, 69, 0))
    wins, clusters = 130, 200

    told = 0.5 * math.erfc(-quantile_of(support, -1 / clusters) / math.sqrt(2))

    assert told == pytest.approx(binom.cdf(99, clusters, wins / clusters), rel=0.03)
    assert told < 1e-5


@pytest.mark.parametrize("rows", [30, 60, 200])
@pytest.mark.parametrize("differing", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("look", [1, 5, 20])
def test_without_a_difference_the_lower_bound_clears_zero_no_more_often_than_its_level(
    rows: int, differing: float, look: int
) -> None:
    """Every possible outcome of independent rows counted, not simulated."""
    alpha = Budget(0.05).level(look)
    chance = sum(
        binom.pmf(discordant, rows, differing) * binom.sf(_wins_needed(rows, discordant, alpha) - 1, discordant, 0.5)
        for discordant in range(rows + 1)
        if binom.pmf(discordant, rows, differing) > 1e-7
    )

    assert chance <= alpha


def _wins_needed(rows: int, discordant: int, alpha: float) -> int:
    low, high = discordant // 2, discordant + 1
    while low < high:
        wins = (low + high) // 2
        enough = wins <= discordant and bounds(of(wins, discordant - wins, rows - discordant), alpha).low > 0
        low, high = (low, wins) if enough else (wins + 1, high)
    return low


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 50)), min_size=2, max_size=80),
    st.sampled_from([0.4, 0.05, 0.025, 1e-3, 1e-5]),
)
def test_bounds_of_anything_hold_the_mean_and_stay_in_range(rows: list[tuple[float, int]], alpha: float) -> None:
    sizes = np.array([size for _, size in rows], dtype=float)
    clusters = Clusters(np.array([share for share, _ in rows]) * sizes, sizes)

    low, high = bounds(clusters, alpha)
    mirrored = bounds(Clusters(-clusters.sums, sizes), alpha)

    assert -1 <= low <= high <= 1
    assert list(mirrored) == pytest.approx([-high, -low], abs=1e-6)
    assert bounds(clusters, alpha / 2).low <= low + 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_few_groups_that_win_alike_are_luck_however_many_rows_they_have(seed: int) -> None:
    """Four of forty groups win, with ten rows each: a coin gives that one time in sixteen."""
    sizes = np.random.default_rng(seed).integers(5, 15, 40).astype(float)

    def won(groups: int) -> Clusters:
        return Clusters(np.where(np.arange(40) < groups, 0.3 * sizes, 0.0), sizes)

    assert bounds(won(4), 0.025).low < 0
    assert bounds(won(14), 0.025).low > 0
