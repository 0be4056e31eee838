"""The gate for heads as a pure function: what it must promote, what it must refuse, and what it predicts."""

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import StepCost
from worker.gate.speculator import Cost, Drafter, Held, drafting_ms, goodput, judge, step_ms
from worker.gate.speculator_job import evidence, judge_report, middling

# A machine that waits for memory: sixteen tokens cost little more than one.
CHEAP = [Cost(1, 1, 1.0), Cost(1, 16, 1.3), Cost(1, 64, 2.0)]
# One that waits for arithmetic.
DEAR = [Cost(1, 1, 1.0), Cost(1, 16, 16.0), Cost(1, 64, 64.0)]
GOOD = Drafter((0.8, 0.6, 0.4, 0.3), {1: 0.05, 16: 0.1})
POOR = Drafter((0.5, 0.2, 0.1, 0.05), {1: 0.05, 16: 0.1})


def held(count: int, candidate: float, incumbent: float, spread: float = 0.3, seed: int = 0) -> list[Held]:
    random = Random(seed)
    return [
        Held(f"g{i}", candidate + random.uniform(-spread, spread), incumbent + random.uniform(-spread, spread))
        for i in range(count)
    ]


def test_heads_that_yield_more_are_promoted_with_the_figures_in_words() -> None:
    verdict = judge(held(60, 3.1, 2.4), GOOD, POOR, CHEAP)

    assert verdict.promote
    assert verdict.gain == pytest.approx(0.7 / 2.4, abs=0.03)
    assert 0 < verdict.interval.low < verdict.gain < verdict.interval.high
    assert "more tokens come out of a step: +2" in verdict.reasons[0]
    assert "for one stream" in verdict.reasons[1]
    assert "for 16 streams" in verdict.reasons[2]


def test_a_gain_that_may_be_chance_is_refused() -> None:
    verdict = judge(held(40, 2.45, 2.4, spread=1.0), GOOD, GOOD, CHEAP)

    assert not verdict.promote
    assert "not shown to yield more" in verdict.reasons[0]


def test_a_sure_gain_below_two_percent_is_refused() -> None:
    verdict = judge(held(3000, 2.424, 2.4, spread=0.01), GOOD, GOOD, CHEAP)

    assert not verdict.promote
    assert verdict.interval.low > 0
    assert "not worth a swap" in verdict.reasons[0]


def test_an_app_with_one_user_for_all_is_judged_by_its_requests() -> None:
    rows = held(60, 3.1, 2.4)
    for users in (1, 4):
        assert judge([row._replace(group=f"g{i % users}") for i, row in enumerate(rows)], GOOD, POOR, CHEAP).promote
    noise = held(60, 2.45, 2.4, spread=1.0)
    assert not judge([row._replace(group="app") for row in noise], GOOD, GOOD, CHEAP).promote


def test_a_session_that_agrees_with_itself_is_one_witness() -> None:
    rows = [Held(f"g{i}", 2.6 + (i % 6 - 2.5) / 2, 2.4) for i in range(120)]
    sessions = [row._replace(group=f"g{i % 6}") for i, row in enumerate(rows)]

    assert judge(rows, GOOD, POOR, CHEAP).promote
    refused = judge(sessions, GOOD, POOR, CHEAP)
    assert not refused.promote
    assert refused.interval.low < 0


def test_too_few_requests_decide_nothing() -> None:
    verdict = judge(held(19, 3.0, 1.0), GOOD, None, CHEAP)

    assert not verdict.promote
    assert verdict.reasons == ["19 held-out requests are too few to judge by; it takes 20"]


def test_first_heads_must_pay_on_this_machine() -> None:
    rows = held(60, 1.6, 1.0, spread=0.0)
    weak = Drafter((0.4, 0.2), {1: 0.05, 16: 0.1})

    assert judge(rows, weak, None, CHEAP).promote
    refused = judge(rows, weak, None, DEAR)
    assert not refused.promote
    assert "drafting and verifying cost what they bring" in refused.reasons[0]


def test_heads_that_yield_more_but_draft_too_slowly_are_refused() -> None:
    slow = Drafter(GOOD.survival, {1: 3.0, 16: 3.0})

    verdict = judge(held(60, 3.1, 2.4), slow, POOR, CHEAP)

    assert not verdict.promote
    assert verdict.reasons[0].startswith("slower in spite of it")


def test_without_a_table_of_costs_only_yield_decides() -> None:
    assert judge(held(60, 3.1, 2.4), GOOD, POOR, []).promote


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 5))
def test_goodput_is_never_below_not_drafting(chances: list[float], milliseconds: float) -> None:
    survival = sorted(chances, reverse=True)
    for rows in (1, 16):
        assert (
            goodput(rows, Drafter(survival, {1: milliseconds}), DEAR) >= 1000 * rows / step_ms(rows, rows, DEAR) - 1e-9
        )


def test_goodput_is_tokens_over_time() -> None:
    always = Drafter((1.0,), {1: 0.5})

    assert goodput(1, always, [Cost(1, 1, 1.0), Cost(1, 2, 1.0)]) == pytest.approx(1000 * 2 / 1.5)


def test_steps_between_and_beyond_the_measured_are_linear() -> None:
    assert step_ms(1, 1, CHEAP) == 1.0
    assert step_ms(1, 40, CHEAP) == pytest.approx(1.65)
    assert step_ms(1, 112, CHEAP) == pytest.approx(2.7)
    by_rows = [*CHEAP, Cost(16, 16, 3.0), Cost(16, 64, 6.0)]
    assert step_ms(12, 64, by_rows) == 6.0
    assert step_ms(2, 64, by_rows) == 2.0
    assert drafting_ms(4, GOOD) == 0.1
    assert drafting_ms(99, GOOD) == 0.1


def measured(incumbent: bool) -> dict[str, Any]:
    rows = [
        {"group": "", "tokens": 40, "temperature": 0.0, "candidate": row.candidate, "incumbent": row.incumbent}
        for row in held(40, 3.0, 2.0)
    ]
    old = {"survival": [0.5, 0.3], "ms": {"1": 0.05, "16": 0.1}, "tau": {"greedy": 1.8, "shared": 1.8}}
    return {
        "held_out": rows, "tau": {"greedy": 3.1, "shared": 3.0},
        "incumbent_tau": old["tau"] if incumbent else None,
        "survival": {"candidate": [0.9, 0.7, 0.4], "incumbent": old["survival"] if incumbent else None},
        "drafting_ms": {"candidate": {"1": 0.05, "16": 0.1}, "incumbent": old["ms"] if incumbent else None},
    }  # fmt: skip


def test_the_trainers_report_and_the_engines_table_are_what_is_judged() -> None:
    table = [
        StepCost(rows=1, tokens=tokens, context=context, milliseconds=tokens * 0.1 + context / 1000)
        for tokens in (1, 16, 64) for context in (64, 512, 2048)
    ]  # fmt: skip
    assert middling(table)[0] == Cost(1, 1, 0.1 + 0.512)

    first, better = judge_report(measured(incumbent=False), table), judge_report(measured(incumbent=True), table)

    # Without an incumbent a step yields one token, so the same heads gain more.
    assert first.gain > better.gain > 0.4
    told = evidence(measured(incumbent=True), better)
    assert told["decision"] == "promote"
    assert told["requests"] == 40
    assert told["tau"] == 3.0
    assert told["goodput_1"] > told["incumbent_goodput_1"]
