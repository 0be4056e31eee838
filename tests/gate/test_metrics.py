"""Metrics: what they say on plain cases, and that hostile text never raises."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.gate.metrics import METRICS, choose, edit_distance, exact_match, field_f1, json_valid, similarity

TEXT = st.text(alphabet='ab {}[]":,1\ud800é', max_size=40)


@pytest.mark.parametrize("name", METRICS)
@given(output=TEXT, golden=TEXT)
def test_every_metric_stays_between_0_and_1(name: str, output: str, golden: str) -> None:
    assert 0 <= METRICS[name](output, golden) <= 1


@pytest.mark.parametrize("name", ["exact_match", "field_f1", "similarity"])
@given(output=TEXT, golden=TEXT)
@example(output="{}", golden="")
def test_nothing_scores_above_the_golden_answer_itself(name: str, output: str, golden: str) -> None:
    assert METRICS[name](output, golden) <= METRICS[name](golden, golden)


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
