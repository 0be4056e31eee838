"""What a decision is called: never more than the slices' verdicts say."""

from typing import Any

import pytest

from services.store.evaluation_config import BASE_ABILITY
from services.store.gate_words import headline, passage, shown
from services.store.models import Evaluation

BETTER = {"low": 0.1}
KEPT = {"low": -0.01, "margin": 0.03, "weak": False, "harmed": False}
WEAK = {"low": -0.08, "margin": 0.03, "weak": True, "harmed": False}


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        ({"target": BETTER}, "better on what was corrected; general ability unknown"),
        (
            {"target": BETTER, "accepted": KEPT, BASE_ABILITY: KEPT},
            "better on what was corrected; within the margin on accepted and base-ability",
        ),
        (
            {"target": BETTER, "accepted": KEPT, BASE_ABILITY: WEAK},
            (
                "better on what was corrected; within the margin on accepted; "
                "no evident harm on base-ability, with too few rows to say more"
            ),
        ),
    ],
)
def test_a_promotion_claims_what_its_slices_show(slices: dict[str, Any], words: str) -> None:
    assert shown({"slices": slices}) == words
    assert headline(Evaluation(decision="promote", summary={"slices": slices})) == f"Passed the gate: {words}"


def test_a_refusal_that_was_overridden_never_passed() -> None:
    refused = Evaluation(decision="refuse", summary={})
    assert headline(refused) == "Refused: what served stays"
    refused.overridden_by, refused.override_reason = "ada", "The metric is wrong."
    assert headline(refused) == "Refused by the gate, let through by a person"
    assert passage(refused, "run 7") == "the gate refused run 7; ada let it through: The metric is wrong."
    assert passage(Evaluation(decision="promote"), "run 7") == "run 7 passed the gate"
