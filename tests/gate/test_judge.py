"""The judge: believed where both orders say the same, and measured against people."""

from uuid import UUID

import pytest

from services.store.evaluation_answers import Answer
from worker.gate.judge import Asked, Outcome, Pair, agreement, outcome_of, scores_of
from worker.gate.score import Ask

ASKED = Asked(Pair(UUID(int=1), [], "old", "new"), Ask(UUID(int=1), [1], 1), Ask(UUID(int=1), [2], 1))


def told(candidate_first: str, baseline_first: str) -> str:
    """What follows from the judge's two replies."""
    answers = {
        ASKED.candidate_first.key: Answer(candidate_first, "stop", 1),
        ASKED.baseline_first.key: Answer(baseline_first, "stop", 1),
    }
    return outcome_of(ASKED, answers)


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("A", "B", "win"), ("B", "A", "loss"), ("tie", "tie", "tie"), ("A", "A", "inconsistent"),
        ("B", "B", "inconsistent"), ("A", "tie", "inconsistent"), ("", "B", "unsaid"),
    ],
)  # fmt: skip
def test_a_preference_that_turns_with_the_order_is_none(first: str, second: str, outcome: str) -> None:
    assert told(first, second) == outcome


def test_only_a_consistent_preference_moves_the_scores() -> None:
    assert scores_of("win") == (0.0, 1.0)
    assert scores_of("loss") == (1.0, 0.0)
    assert scores_of("inconsistent") == scores_of("unsaid") == scores_of("tie") == (0.5, 0.5)


def test_agreement_is_beyond_chance_or_undefined() -> None:
    told: list[tuple[Outcome, Outcome]] = [("win", "win")] * 20
    told += [("loss", "loss")] * 15
    told += [("win", "loss")] * 5
    told += [("loss", "win")] * 10
    both = agreement(told)

    assert (both.rows, both.same) == (50, 35)
    # Cohen's example: observed 0.7, expected 0.5.
    assert both.kappa == pytest.approx(0.4)
    assert agreement([("win", "win")] * 9).kappa is None
    assert agreement([]).rows == 0
