"""A project's configuration is checked before it is stored, because every process reads it unchecked."""

from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient

from services.bootstrap import bootstrap
from services.errors import InvalidRequest
from services.settings import Settings
from services.store import projects
from services.store.base import Sessions
from services.store.evaluation_config import Metric
from services.store.speculation import SpeculationConfig, read_config
from services.web import create_app
from worker.gate.metrics import METRICS


def test_only_the_keys_given_change(sessions: Sessions) -> None:
    with sessions.begin() as session:
        project = projects.create(session, "support", config={"tags": ["rude"], "window_seconds": 60})
        projects.configure(session, project, {"window_seconds": 8, "tags": None, "train": {"epochs": 2}})
    with sessions() as session:
        assert projects.get(session, "support").config == {"window_seconds": 8, "train": {"epochs": 2}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"windows_seconds": 8}, r"windows_seconds: Extra inputs are not permitted \(known: tags, "),
        ({"window_seconds": "soon"}, "window_seconds: Input should be a valid integer"),
        ({"held_out_share": 1.5}, "held_out_share: Input should be less than or equal to 0.9"),
        ({"speculation": {"growth": 1}}, "speculation.growth: Input should be greater than 1"),
        ({"speculation": {"share": 1}}, r"speculation.share: Extra inputs .* \(known: enabled, automatic, "),
        ({"guidelines": "a\x00b"}, "guidelines: this holds a character or a number that cannot be stored"),
        ({"response_schema": {"const": "\ud800"}}, "response_schema: this holds a character"),
        ({"metrics": ["vibes"]}, "metrics.0: Input should be 'exact_match'"),
        ({"margins": {"accepted": 120}}, "margins.accepted: Input should be less than or equal to 100"),
        ({"checks": [{"name": "a"}]}, "checks.0: say exactly one of must_match, must_not_match and json_schema"),
        ({"checks": [{"name": "a", "must_match": "(?=x)"}]}, "checks.0.must_match: .*look-around"),
        ({"checks": [{"name": "a", "must_match": "(a{20}){20}"}]}, "repetitions of a pattern may multiply to 200"),
        ({"checks": [{"name": "a", "must_match": "a" * 301}]}, "at most 300 characters"),
        ({"checks": 2 * [{"name": "a", "must_match": "x"}]}, "checks: two checks have the same name"),
        ({"judge": {"model": "base"}}, "judge.rubric: Field required"),
        ({"judge": {"rubrics": "x", "rubric": "x"}}, r"judge.rubrics: Extra inputs .* \(known: model, rubric\)"),
    ],
)
def test_a_bad_key_changes_nothing(sessions: Sessions, changes: dict[str, Any], sentence: str) -> None:
    with sessions.begin() as session:
        project = projects.create(session, "support", config={"window_seconds": 60})
        with pytest.raises(InvalidRequest, match=sentence):
            projects.configure(session, project, {"guidelines": "new", **changes})
    with sessions() as session:
        assert projects.get(session, "support").config == {"window_seconds": 60}


def test_only_what_was_chosen_of_speculation_is_stored_and_the_rest_has_defaults(sessions: Sessions) -> None:
    with sessions.begin() as session:
        project = projects.create(session, "support")
        projects.configure(session, project, {"speculation": {"canary_share": 0.1}})
        assert project.config == {"speculation": {"canary_share": 0.1}}
        assert read_config(project.config) == SpeculationConfig(canary_share=0.1)


@pytest.mark.parametrize("stored", [None, "fast", {"growth": "much"}])
def test_nonsense_in_the_database_reads_as_the_defaults(stored: object) -> None:
    assert read_config({"speculation": stored}) == SpeculationConfig()
    assert not read_config({"speculation": {"enabled": False, "from_a_newer_release": 1}}).enabled


def test_the_metrics_are_the_gates_own() -> None:
    assert set(get_args(Metric)) == set(METRICS)


def test_the_admin_api_configures_a_project(settings: Settings, sessions: Sessions) -> None:
    bootstrap(settings)
    admin_key = (settings.home / "credentials.json").read_text().split('"admin_key": "')[1].split('"')[0]
    client = TestClient(create_app(settings, sessions), headers={"authorization": f"Bearer {admin_key}"})
    changed = client.patch("/api/projects/chat", json={"config": {"window_seconds": 8}})
    refused = client.patch("/api/projects/chat", json={"config": {"window_seconds": -1}})
    assert changed.status_code == 200
    assert changed.json()["config"]["window_seconds"] == 8
    assert "policy" in changed.json()["config"]["guidelines"]
    assert refused.status_code == 400
    assert "window_seconds" in refused.json()["error"]["message"]
