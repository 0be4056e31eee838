"""The gate as a pure function: what it must promote, what it must refuse, and what it may never do."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.gate.decide import Decision, Policy, ScoredRow, decide, tabulate
from worker.gate.looks import Budget

ROWS = st.lists(
    st.builds(
        ScoredRow,
        slice=st.sampled_from(["target", "accepted"]),
        group=st.sampled_from([f"g{index}" for index in range(60)]),
        baseline=st.sampled_from([0.0, 0.5, 1.0]),
        candidate=st.sampled_from([0.0, 0.5, 1.0]),
    ),
    max_size=150,
)


def drawn(seed: int, rows: int, baseline: float, candidate: float, name: str = "target") -> list[ScoredRow]:
    """Independent rows, right with these chances."""
    random = Random(seed)
    return [
        ScoredRow(name, f"{name}{index}", float(random.random() < baseline), float(random.random() < candidate))
        for index in range(rows)
    ]


def outcomes(*, wins: int = 0, ties: int = 0, losses: int = 0) -> list[ScoredRow]:
    """A target slice with exactly these."""
    pairs = [(0.0, 1.0)] * wins + [(0.0, 0.0)] * ties + [(1.0, 0.0)] * losses
    return [ScoredRow("target", f"t{index}", *pair) for index, pair in enumerate(pairs)]


def kept(rows: int, lost: int = 0) -> list[ScoredRow]:
    """A guarded slice that was right everywhere, of which the candidate loses some."""
    return [ScoredRow("accepted", f"a{index}", 1.0, float(index >= lost)) for index in range(rows)]


def test_a_candidate_that_is_much_better_and_keeps_what_was_right_is_promoted() -> None:
    decision = decide(drawn(1, 80, 0.1, 0.9) + kept(200), look=1)

    assert decision.promote
    assert decision.needed is None
    assert decision.slices["target"].low > 0.5
    assert "better on what was corrected" in " ".join(decision.reasons)


def test_candidates_that_are_no_better_are_promoted_at_most_as_often_as_alpha_allows() -> None:
    promoted = sum(decide(drawn(seed, 60, 0.3, 0.3), look=1).promote for seed in range(200))

    assert promoted <= 8


def test_four_wins_among_ties_are_luck_and_ten_are_not() -> None:
    assert not decide(outcomes(wins=4, ties=96), look=1).promote
    assert decide(outcomes(wins=10, ties=90), look=1).promote


def test_harm_to_what_was_right_refuses_however_good_the_target_is() -> None:
    decision = decide(drawn(1, 200, 0.0, 1.0) + kept(1200, lost=120), look=1)

    assert not decision.promote
    assert decision.reasons[0].startswith("may be worse on accepted by more than 3 points: −10.0 points")


def test_a_guarded_slice_with_rows_enough_must_show_that_nothing_is_lost_and_is_told_how_many_would() -> None:
    target = drawn(1, 80, 0.1, 0.9)

    unharmed, unsure = (decide(target + kept(1200, lost=lost), look=1) for lost in (3, 30))

    assert unharmed.promote
    assert not unharmed.slices["accepted"].weak
    assert not unsure.promote
    assert unsure.reasons[0].startswith("may be worse on accepted by more than 3 points: −2.5 points")
    assert 0 < unsure.wanted["accepted"] == unsure.needed


def test_many_rows_of_few_groups_are_a_weak_slice() -> None:
    rows = [ScoredRow("accepted", f"g{index % 40}", 1.0, float(index % 40 > 0)) for index in range(2000)]

    assert decide(rows, look=1).slices["accepted"].weak


def test_a_margin_of_nothing_is_kept_by_gains_alone_and_no_number_of_labels_is_promised_for_it() -> None:
    target, policy = drawn(1, 80, 0.1, 0.9), Policy(margin=0.0)
    better = [
        row._replace(slice="accepted", group=f"a{index}") for index, row in enumerate(outcomes(wins=2, ties=1198))
    ]

    weak, strong, gained = (decide(target + rows, look=1, policy=policy) for rows in (kept(15), kept(1200), better))

    assert weak.promote
    assert "cannot rule 0 points out, and no number of them would" in weak.reasons[-1]
    assert not strong.promote
    assert strong.wanted == gained.wanted == {}


def test_a_weak_slice_counts_what_it_lacks_in_groups() -> None:
    target = drawn(1, 80, 0.1, 0.9)
    many_rows = [ScoredRow("accepted", f"g{index % 40}", 1.0, float(index > 1)) for index in range(2000)]
    policy = Policy(margin=1e-9 + 0.001, guard_groups=10**8)

    pairs = [ScoredRow("accepted", f"g{index // 5}", 1.0, float(index > 1)) for index in range(500)]

    assert decide(target + many_rows, look=1, policy=policy).reasons[-1].endswith(f"needs about {10**8 - 40:,} more")
    strong_at = decide(target + pairs, look=1, policy=Policy(margin=0.004, guard_rows=5 * 10**8)).reasons[-1]
    assert strong_at.endswith(f"needs about {10**8 - 100:,} more")


def test_a_slice_may_have_a_margin_of_its_own() -> None:
    rows = drawn(1, 80, 0.1, 0.9) + kept(1200, lost=120)

    assert decide(rows, look=1, policy=Policy(margins={"accepted": 0.15})).promote
    assert not decide(rows, look=1, policy=Policy(margins={"other": 0.15})).promote


def test_a_guarded_slice_too_small_to_prove_anything_refuses_on_evidence_of_harm_only() -> None:
    target = drawn(1, 80, 0.1, 0.9)

    unharmed, one, many = (decide(target + kept(15, lost=lost), look=1) for lost in (0, 1, 6))

    assert unharmed.promote
    assert one.promote
    assert not many.promote
    assert [one.slices["accepted"].harmed for one in (unharmed, one, many)] == [False, False, True]
    assert "cannot rule 3 points out" in " ".join(unharmed.reasons)
    assert many.reasons[0].startswith("worse on accepted")


def test_too_few_corrections_are_refused_with_how_many_are_missing() -> None:
    decision = decide(drawn(1, 12, 0.0, 1.0), look=1)

    assert not decision.promote
    assert decision.reasons == ["too few held-out corrections to judge by: 12 groups, needs 18 more"]
    assert decision.needed == 18
    assert decide([], look=1).needed == 30


def test_rows_of_one_group_count_as_one_voice() -> None:
    rows = [ScoredRow("target", f"g{index % 10}", 0.0, 1.0) for index in range(500)]

    assert not decide(rows, look=1).promote


def test_a_refused_candidate_is_told_how_many_labels_would_show_it() -> None:
    decision = decide(outcomes(wins=8, ties=47, losses=5), look=1)

    assert not decision.promote
    assert decision.needed is not None
    assert 50 < decision.needed < 20_000


def test_every_look_spends_less_and_together_they_spend_alpha() -> None:
    levels = [Budget(0.05).level(look) for look in range(1, 2000)]

    assert levels == sorted(levels, reverse=True)
    assert 0.0499 < sum(levels) <= 0.05
    with pytest.raises(ValueError, match="from 1"):
        Budget(0.05).level(0)


def test_a_promotion_hands_its_level_on_and_a_refusal_does_not() -> None:
    good, bad = drawn(1, 80, 0.1, 0.9), drawn(1, 80, 0.5, 0.5)

    first = decide(good, look=1)
    second = decide(good, look=2, carried=first.carry)
    refused = decide(bad, look=3, carried=second.carry)

    assert (first.alpha, first.carry) == (0.025, 0.025)
    assert second.alpha == pytest.approx(0.05 / 6 + 0.025)
    assert refused.alpha == pytest.approx(0.05 / 12 + second.alpha)
    assert refused.carry == 0
    with pytest.raises(ValueError, match="nothing is handed on"):
        decide(good, look=2, carried=-0.01)


def test_what_was_handed_on_is_spent_at_most_once_whatever_is_promoted() -> None:
    """Online fallback: whichever looks were true promotions, the levels of the others sum to at most alpha."""
    random = Random(7)
    for _ in range(200):
        carried, false_levels = 0.0, 0.0
        for look in range(1, 60):
            level = Budget(0.05).level(look, carried)
            if random.random() < 0.5:
                carried = level
            else:
                carried, false_levels = 0.0, false_levels + level
        assert false_levels <= 0.05 + 1e-12


def test_too_few_rows_are_no_test_and_cost_no_look() -> None:
    assert not decide(drawn(1, 12, 0.0, 1.0), look=1).tested
    assert decide(drawn(1, 40, 0.5, 0.5), look=1).tested


def test_a_gain_that_passes_at_the_first_look_no_longer_does_at_the_twentieth() -> None:
    rows = outcomes(wins=16, ties=80, losses=4)

    assert decide(rows, look=1).promote
    assert not decide(rows, look=20).promote


def test_rows_and_tables_are_decided_alike() -> None:
    rows = drawn(1, 80, 0.1, 0.9) + kept(200, lost=4)

    assert decide(rows, look=3) == decide(tabulate(rows), look=3)
    assert isinstance(tabulate(rows)["target"].groups, np.ndarray)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_of_two_candidates_never_both_beat_each_other(rows: list[ScoredRow]) -> None:
    swapped = [row._replace(baseline=row.candidate, candidate=row.baseline) for row in rows]

    assert not (decide(rows, look=1).promote and decide(swapped, look=1).promote)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms())
def test_the_decision_is_a_function_of_the_rows_and_not_of_their_order(rows: list[ScoredRow], random: Random) -> None:
    shuffled = random.sample(rows, len(rows))

    assert outcome(decide(rows, look=2)) == outcome(decide(shuffled, look=2))


def outcome(decision: Decision) -> tuple[bool, list[str]]:
    return decision.promote, decision.reasons


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_promotion_needs_a_positive_lower_bound_and_every_figure_is_consistent(rows: list[ScoredRow]) -> None:
    decision = decide(rows, look=1, policy=Policy(min_groups=5))

    for result in decision.slices.values():
        assert result.wins + result.ties + result.losses == result.rows
        assert result.delta == pytest.approx(result.candidate - result.baseline)
        assert result.low <= result.high
    if decision.promote:
        assert decision.slices["target"].low > 0
