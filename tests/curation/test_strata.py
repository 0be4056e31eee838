"""The sampling plan as arithmetic: quotas, order, split, and the estimate that rests on them."""

from random import Random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.base import uuid7
from worker.curation.estimate import Stratum, estimate
from worker.curation.split import split_of
from worker.curation.strata import UNIFORM, Candidate, interleave, plan, quotas

SIZES = st.fixed_dictionaries(
    {}, optional={"negative_feedback": st.integers(1, 3000), UNIFORM: st.integers(1, 3000)}
)  # fmt: skip


def candidates(negative: int, others: int) -> list[Candidate]:
    return [Candidate(uuid7(), f"g{index}", index < negative) for index in range(negative + others)]


@given(SIZES, st.integers(1, 500), st.floats(0.2, 1.0))
def test_quotas_fill_the_budget_and_leave_no_stratum_out(sizes: dict[str, int], budget: int, share: float) -> None:
    quota = quotas(sizes, budget, share)

    assert all(1 <= quota[name] <= sizes[name] for name in sizes)
    assert all(quota[name] >= min(sizes[name], 0.01 * budget) for name in sizes)
    expected = min(budget, sum(sizes.values()))
    assert expected <= sum(quota.values()) <= expected + len(sizes)


@given(SIZES, st.integers(10, 500))
def test_every_beginning_of_the_queue_holds_the_uniform_audits_share(sizes: dict[str, int], budget: int) -> None:
    quota = quotas(sizes, budget, 0.2)
    if UNIFORM not in quota:
        return
    share = quota[UNIFORM] / sum(quota.values())

    seen = 0
    for length, (name, _) in enumerate(interleave(quota), start=1):
        seen += name == UNIFORM
        assert seen >= share * length - 1e-9


def test_uniform_audit_gets_a_fifth_of_the_labels_when_complaints_could_fill_the_budget() -> None:
    placed = plan("salt", candidates(negative=500, others=500), budget=100, uniform_share=0.2)

    assert [item.strategy for item in placed].count(UNIFORM) == 20
    assert len(placed) == 100
    assert [item.priority for item in placed] == list(range(100))
    assert {item.stratum_size for item in placed} == {500}


def test_the_plan_does_not_depend_on_the_order_of_the_log() -> None:
    frame = candidates(negative=20, others=80)

    one = plan("salt", frame, budget=30, uniform_share=0.2)
    other = plan("salt", frame[::-1], budget=30, uniform_share=0.2)

    assert one == other
    assert one != plan("other salt", frame, budget=30, uniform_share=0.2)


def test_split_belongs_to_the_group_and_takes_its_share() -> None:
    project = UUID(int=7)
    splits = [split_of(project, f"group {index}", 0.2) for index in range(5000)]

    assert splits == [split_of(project, f"group {index}", 0.2) for index in range(5000)]
    assert 0.17 < splits.count("held_out") / 5000 < 0.23
    assert splits != [split_of(UUID(int=8), f"group {index}", 0.2) for index in range(5000)]


def test_no_estimate_while_a_stratum_has_no_label() -> None:
    assert estimate([]) is None
    assert estimate([Stratum(100, 10, 9.0), Stratum(900, 0, 0.0)]) is None
    assert estimate([Stratum(100, 10, 9.0), Stratum(900, 10, 9.0)]) is not None


def test_a_stratum_labelled_to_the_last_one_leaves_no_doubt() -> None:
    known = estimate([Stratum(10, 10, 9.0)])

    assert known is not None
    assert known.rate == pytest.approx(0.9)
    assert known.high - known.low == pytest.approx(0.0)


def test_weighted_estimate_is_unbiased_where_the_naive_mean_is_far_off() -> None:
    """Users complain about half of the failures; reviewers see complaints first; the truth is 10 % failures."""
    random = Random(20)
    naive, weighted, covered = [], [], 0
    for trial in range(120):
        frame = [Candidate(uuid7(), str(index), negative=False) for index in range(600)]
        wrong = {candidate.interaction_id for candidate in frame if random.random() < 0.1}
        frame = [
            Candidate(c.interaction_id, c.group_key, c.interaction_id in wrong and random.random() < 0.5) for c in frame
        ]
        labelled = plan(f"trial {trial}", frame, budget=150, uniform_share=0.2)[:100]
        right = [item.candidate.interaction_id not in wrong for item in labelled]
        naive.append(sum(right) / len(right))
        strata = []
        for name in {item.strategy for item in labelled}:
            scores = [ok for item, ok in zip(labelled, right, strict=True) if item.strategy == name]
            size = next(item.stratum_size for item in labelled if item.strategy == name)
            strata.append(Stratum(size, len(scores), float(sum(scores))))
        found = estimate(strata)
        assert found is not None
        truth = 1 - len(wrong) / len(frame)
        weighted.append(found.rate - truth)
        covered += found.low <= truth <= found.high

    assert abs(sum(weighted) / len(weighted)) < 0.008
    assert sum(naive) / len(naive) < 0.8
    assert covered >= 108
