"""Metrics: what they say on plain cases, and that hostile text never raises."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.store.evaluation_config import CheckConfig
from worker.gate.metrics import (
    METRICS,
    Said,
    Wanted,
    choose,
    edit_distance,
    exact_match,
    field_f1,
    json_valid,
    similarity,
)

TEXT = st.text(alphabet='ab {}[]":,1\ud800é', max_size=40)


@pytest.mark.parametrize("name", METRICS)
@given(output=TEXT, golden=TEXT)
def test_every_metric_stays_between_0_and_1(name: str, output: str, golden: str) -> None:
    checks = [
        CheckConfig(name="no a", must_not_match="a+b"),
        CheckConfig(name="object", json_schema={"type": "object"}),
    ]
    wanted = Wanted(golden, '{"type": "object", "required": ["a"]}', checks)

    assert 0 <= METRICS[name](Said(output, 0.25, 1.0), wanted) <= 1


@pytest.mark.parametrize("name", ["exact_match", "field_f1", "similarity"])
@given(output=TEXT, golden=TEXT)
@example(output="{}", golden="")
def test_nothing_scores_above_the_golden_answer_itself(name: str, output: str, golden: str) -> None:
    wanted = Wanted(golden)

    assert METRICS[name](Said(output), wanted) <= METRICS[name](Said(golden), wanted)


@pytest.mark.parametrize("bomb", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "NaN", ""])
def test_hostile_json_scores_and_does_not_raise(bomb: str) -> None:
    assert 0 <= json_valid(bomb, "{}") <= 1
    assert field_f1(bomb, '{"a": 1}') == 0


def test_exact_match_forgives_only_blanks_at_the_ends() -> None:
    assert exact_match(" yes\n", "yes") == 1
    assert exact_match("y es", "yes") == 0


def test_field_f1_counts_leaves_and_ignores_the_order_of_lists() -> None:
    golden = '{"people": ["Ada", "Bela"], "places": ["Ashbridge"]}'

    assert field_f1('{"places": ["Ashbridge"], "people": ["Bela", "Ada"]}', golden) == 1
    assert field_f1('{"people": ["Ada"]}', golden) == pytest.approx(2 * 1 / (1 + 3))
    assert field_f1('{"people": ["Ada", "Ada", "Ada"]}', golden) == pytest.approx(2 * 1 / (3 + 3))
    assert field_f1("no JSON", golden) == 0


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_agrees_with_the_textbook_table(one: str, other: str) -> None:
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row = row, [i]
        for j, right in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right)))

    assert edit_distance(one, other) == row[-1]


def test_similarity_is_one_minus_the_share_of_edits() -> None:
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("", "") == 1


def test_the_first_chosen_metric_decides_and_unknown_ones_are_named() -> None:
    assert list(choose(["field_f1", "exact_match"])) == ["field_f1", "exact_match"]
    with pytest.raises(ValueError, match="bleu"):
        choose(["bleu"])
    with pytest.raises(ValueError, match="choose from"):
        choose([])


def test_a_schema_and_checks_score_what_they_say() -> None:
    schema = '{"type": "object", "required": ["people"], "properties": {"people": {"type": "array"}}}'
    checks = (
        CheckConfig(name="cites", must_match=r"policy \d+"),
        CheckConfig(name="polite", must_not_match="(?i)no way"),
    )
    wanted = Wanted("", schema, checks)

    assert METRICS["schema_valid"](Said('{"people": []}'), wanted) == 1
    assert METRICS["schema_valid"](Said('{"people": "Ada"}'), wanted) == 0
    assert METRICS["schema_valid"](Said("no JSON"), Wanted("")) == 1
    assert METRICS["checks"](Said("By policy 14 you may."), wanted) == 1
    assert METRICS["checks"](Said("No way. Policy 14."), wanted) == 0
    assert METRICS["checks"](Said("By policy 14: NO WAY"), wanted) == 0.5
    assert METRICS["checks"](Said("anything"), Wanted("")) == 1


def test_likelihood_and_judge_are_what_was_asked_and_neutral_where_nothing_was() -> None:
    assert METRICS["likelihood"](Said("", likelihood=0.25), Wanted("")) == 0.25
    assert METRICS["likelihood"](Said(""), Wanted("")) == 0
    assert METRICS["judge"](Said("", judged=1.0), Wanted("")) == 1
    assert METRICS["judge"](Said(""), Wanted("")) == 0.5
