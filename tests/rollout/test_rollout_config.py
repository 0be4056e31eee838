"""What may be configured, what is refused, and that the page in docs/ says the same."""

import re
from pathlib import Path

import pytest

from services.errors import InvalidRequest
from services.store.project_config import checked
from services.store.rollout_config import Guardrails, RolloutConfig, Signal, read_rollout
from worker.rollout.judge import RAILS

DOC = (Path(__file__).parents[2] / "docs" / "rollout.md").read_text()


def test_every_key_stands_in_the_documentation_and_no_other() -> None:
    table = DOC.split("| `config.rollout` |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(RolloutConfig.model_fields)
    for name in (*Signal.__args__, *Guardrails.model_fields):  # type: ignore[attr-defined]
        assert f"`{name}`" in DOC


def test_the_guardrails_are_those_that_are_judged() -> None:
    assert list(Guardrails.model_fields) == list(RAILS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0.9}, {"share": 0}, {"mode": "shadow"}, {"signal": "vibes"}, {"harm": 0}, {"score_range": [1, 0]},
        {"pattern": "(["}, {"pattern": r"(a)\1"}, {"guardrails": {"error": 0.1}}, {"shadow": {"requests": -1}},
        {"surprise": 1}, {"score_range": ["-inf", 1]}, {"harm": "nan"},
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_the_key_that_is_wrong(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked({"rollout": wrong})
    assert str(refused.value.param).startswith(f"config.rollout.{next(iter(wrong))}")


def test_only_what_was_chosen_is_stored_and_the_rest_is_the_default() -> None:
    stored = checked({"rollout": {"share": 0.2, "guardrails": {"length": None}}})
    assert stored["rollout"]["share"] == 0.2
    assert "signal" not in stored["rollout"]
    assert read_rollout(stored).share == 0.2


@pytest.mark.parametrize("stored", [None, "fast", {"share": "much"}, {"mode": "direct", "share": 7}])
def test_nonsense_in_the_database_serves_nobody_a_candidate_unseen(stored: object) -> None:
    assert read_rollout({"rollout": stored}) == RolloutConfig()
    assert read_rollout({"rollout": {"share": 0.2, "of_a_newer_release": 1}}).share == 0.2
