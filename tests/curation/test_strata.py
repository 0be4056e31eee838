"""The sampling plan as arithmetic: quotas, order, split, and the estimate that rests on them."""

from math import ceil
from statistics import mean
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sampling_simulation import ORDERS, run, simulate
from services.store.base import uuid7
from services.store.quality import Stratum, estimate, wilson
from services.store.sampling import DEFAULT_MIX, LEAST_AUDIT, PRECEDENCE, UNIFORM, Plan, check_mix, mix_of
from worker.curation.split import split_of
from worker.curation.strata import Candidate, interleave, plan, quotas, stratum_of

SIZES = st.dictionaries(st.sampled_from(PRECEDENCE), st.integers(1, 3000), max_size=6)
CLAIMS = st.frozensets(st.sampled_from(PRECEDENCE[:-1]))


@st.composite
def mixes(draw: st.DrawFn) -> dict[str, float]:
    """Shares that add up to 1, the audit's at least its lock."""
    audit = draw(st.floats(LEAST_AUDIT, 1.0))
    weights = [draw(st.integers(0, 5)) for _ in PRECEDENCE[:-1]]
    total = sum(weights)
    if total == 0:
        return {UNIFORM: 1.0}
    return {name: (1 - audit) * weight / total for name, weight in zip(PRECEDENCE, weights, strict=False)} | {
        UNIFORM: audit
    }


def candidates(negative: int, others: int) -> list[Candidate]:
    flagged = frozenset({"negative_feedback"})
    return [
        Candidate(uuid7(), f"g{index}", flagged if index < negative else frozenset())
        for index in range(negative + others)
    ]


@settings(deadline=None)
@given(SIZES, st.integers(1, 500), mixes())
def test_quotas_fill_the_budget_and_leave_no_stratum_out(
    sizes: dict[str, int], budget: int, mix: dict[str, float]
) -> None:
    quota = quotas(sizes, budget, mix)

    assert quota.keys() == sizes.keys()
    assert all(1 <= quota[name] <= sizes[name] for name in sizes)
    assert all(quota[name] >= min(sizes[name], 0.01 * budget) for name in sizes)
    expected = min(budget, sum(sizes.values()))
    assert expected <= sum(quota.values()) or sum(quota.values()) == sum(sizes.values())
    # A budget smaller than the strata's least grows only so far that the audit keeps its share.
    others = sum(count for name, count in quota.items() if name != UNIFORM)
    assert others <= max(budget, len(sizes) * max(1, ceil(0.01 * budget)))


@settings(deadline=None)
@given(SIZES, st.integers(1, 500), mixes())
def test_the_audit_gets_its_share_of_every_queue_and_of_every_beginning_of_it(
    sizes: dict[str, int], budget: int, mix: dict[str, float]
) -> None:
    quota = quotas(sizes, budget, mix)
    order = interleave(quota)
    audit, total = quota.get(UNIFORM, 0), sum(quota.values())

    assert sorted(order) == sorted((name, index) for name, count in quota.items() for index in range(count))
    assert audit >= LEAST_AUDIT * total - 1e-9 or audit == sizes.get(UNIFORM, 0)
    seen = 0
    for length, (name, _) in enumerate(order, start=1):
        seen += name == UNIFORM
        assert seen * total >= audit * length


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(PRECEDENCE), st.integers(1, 80), min_size=2))
def test_every_stratum_has_its_first_label_before_any_flagged_one_has_its_second(quota: dict[str, int]) -> None:
    flagged = [name for name, _ in interleave(quota) if name != UNIFORM]
    distinct = len(set(flagged))

    assert len(set(flagged[:distinct])) == distinct


@settings(deadline=None)
@given(st.lists(CLAIMS, min_size=1, max_size=150), st.integers(1, 60), mixes())
def test_every_interaction_is_in_exactly_one_stratum_and_the_first_claim_has_it(
    claims: list[frozenset[str]], budget: int, mix: dict[str, float]
) -> None:
    frame = [Candidate(UUID(int=index), "", claimed) for index, claimed in enumerate(claims)]
    placed = plan("salt", frame, budget=budget, mix=mix)
    sizes = {item.strategy: item.stratum_size for item in placed}

    assert sum(sizes.values()) == len(frame)
    assert len({item.candidate.interaction_id for item in placed}) == len(placed)
    for item in placed:
        earlier = PRECEDENCE[: PRECEDENCE.index(item.strategy)]
        assert item.strategy == UNIFORM or item.strategy in item.candidate.claims
        assert not item.candidate.claims & set(earlier)
        assert item.strategy == stratum_of(item.candidate)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 30))
def test_what_is_chosen_of_a_stratum_is_the_beginning_of_its_order_by_hash(size: int, budget: int) -> None:
    frame = candidates(negative=0, others=size)
    everything = plan("salt", frame, budget=size, mix={UNIFORM: 1.0})
    some = plan("salt", frame, budget=budget, mix={UNIFORM: 1.0})

    assert [item.candidate for item in some] == [item.candidate for item in everything][: len(some)]
    assert sorted(item.order_hash for item in everything) == [item.order_hash for item in everything]


def test_uniform_audit_gets_a_fifth_of_the_labels_when_complaints_could_fill_the_budget() -> None:
    mix = {"negative_feedback": 0.8, UNIFORM: 0.2}
    placed = plan("salt", candidates(negative=500, others=500), budget=100, mix=mix)

    assert [item.strategy for item in placed].count(UNIFORM) == 20
    assert len(placed) == 100
    assert [item.priority for item in placed] == list(range(100))
    assert {item.stratum_size for item in placed} == {500}


def test_the_plan_does_not_depend_on_the_order_of_the_log() -> None:
    frame = candidates(negative=20, others=80)

    one = plan("salt", frame, budget=30, mix=DEFAULT_MIX)
    other = plan("salt", frame[::-1], budget=30, mix=DEFAULT_MIX)

    assert one == other
    assert one != plan("other salt", frame, budget=30, mix=DEFAULT_MIX)


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        ({"uniform": 0.19, "novelty": 0.81}, "at least 20%"),
        ({"novelty": 1.0}, "at least 20%"),
        ({"uniform": 0.5, "novelty": 0.4}, "must add up to 100 %, not 90 %"),
        ({"uniform": 1.2, "novelty": -0.2}, "between 0 and 1"),
        ({"uniform": 0.5, "luck": 0.5}, "unknown strategy 'luck'"),
    ],
)
def test_a_mix_that_would_blind_the_audit_or_makes_no_sense_is_refused(mix: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_mix(mix)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_a_configured_audit_share_scales_the_other_strategies_and_never_falls_below_its_lock(share: float) -> None:
    mix = mix_of({"uniform_share": share})

    check_mix(mix)
    assert mix[UNIFORM] == max(LEAST_AUDIT, share)
    assert Plan.of({"uniform_share": share}).mix == mix
    with pytest.raises(ValueError, match="uniform_share"):
        mix_of({"uniform_share": 1.5})


def test_split_belongs_to_the_group_and_takes_its_share() -> None:
    project = UUID(int=7)
    splits = [split_of(project, f"group {index}", 0.2) for index in range(5000)]

    assert splits == [split_of(project, f"group {index}", 0.2) for index in range(5000)]
    assert 0.17 < splits.count("held_out") / 5000 < 0.23
    assert splits != [split_of(UUID(int=8), f"group {index}", 0.2) for index in range(5000)]


# --- the estimate -----------------------------------------------------------------------------------------


def test_no_estimate_while_a_stratum_has_no_label() -> None:
    assert estimate([]) is None
    assert estimate([Stratum("novelty", 100, 10, 9.0), Stratum(UNIFORM, 900, 0, 0.0)]) is None
    assert estimate([Stratum("novelty", 100, 10, 9.0), Stratum(UNIFORM, 900, 10, 9.0)]) is not None


def test_a_stratum_labelled_to_the_last_one_leaves_no_doubt() -> None:
    known = estimate([Stratum(UNIFORM, 10, 10, 9.0)])

    assert known is not None
    assert known.rate == pytest.approx(0.9)
    assert known.high - known.low == pytest.approx(0.0)


def test_labels_that_all_agree_do_not_claim_certainty() -> None:
    known = estimate([Stratum(UNIFORM, 1000, 3, 3.0)])

    assert known is not None
    assert known.rate == 1.0
    assert known.low < 0.5


def test_one_fully_random_stratum_has_wilsons_interval() -> None:
    """Against the published example: 81 of 263 (Newcombe 1998), 0.2553 to 0.3662."""
    assert wilson(81 / 263, 1 / 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


LABELLED = st.integers(1, 400).flatmap(
    lambda size: st.integers(1, size).flatmap(
        lambda labelled: st.tuples(
            st.sampled_from(PRECEDENCE), st.just(size), st.just(labelled), st.floats(0, labelled)
        )
    )
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(LABELLED, min_size=1, max_size=30))
def test_the_interval_holds_the_estimate_and_stays_among_the_shares(
    rows: list[tuple[str, int, int, float]],
) -> None:
    known = estimate([Stratum(*row) for row in rows])

    assert known is not None
    assert 0 <= known.low <= known.rate + 1e-9
    assert known.rate - 1e-9 <= known.high <= 1
    assert known.rate == pytest.approx(sum(r[1] * r[3] / r[2] for r in rows) / sum(r[1] for r in rows))


def test_the_interval_covers_the_truth_where_flagged_items_are_far_off_and_the_normal_one_is_too_sure() -> None:
    """A smaller run of `benchmarks.sampling_simulation`, through plan and estimate as production uses them."""
    rows = run(250, seed=3, rates=(0.02, 0.1), orders=ORDERS[1:2], processes=1)
    found = {(row.rate, row.method): row for row in rows}

    for rate in (0.02, 0.1):
        whet, flagged = found[rate, "Whet"], found[rate, "flagged only"]
        assert whet.streams == 250
        assert 0.91 <= whet.coverage <= 0.985
        assert abs(whet.error) < 0.006
        assert whet.audit >= LEAST_AUDIT
        assert flagged.coverage < 0.05
        assert flagged.error > 0.05
    assert found[0.02, "normal"].coverage < 0.75


def test_what_people_pick_by_hand_is_off_in_its_old_stratum_and_right_in_one_of_its_own() -> None:
    found = [[simulate(0.1, ORDERS[2], seed, apart=apart) for seed in range(150)] for apart in (False, True)]

    errors, covered = [], []
    for outcomes in found:
        told = [(one.truth, one.methods[0]) for one in outcomes if one.methods[0] is not None]
        errors.append(mean(known.rate - truth for truth, known in told))
        covered.append(mean(known.low <= truth <= known.high for truth, known in told))
    assert errors[0] < -0.01
    assert abs(errors[1]) < 0.006
    assert covered[1] >= 0.9
