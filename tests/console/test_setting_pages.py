"""How candidates reach traffic and how the gate scores: the two forms, who may send them, the API and the command."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from services import cli, cli_client
from services.console import setting_form
from services.store import keys, project_settings, projects, trials
from services.store.base import Sessions
from services.store.models import AuditEvent, Project
from services.store.project_settings import Part
from services.store.rollout_config import NEEDS, SIGNALS, read_rollout
from tests.console import seed_rollout
from tests.console.conftest import PEPPER, SignIn
from worker.gate.decide import Policy
from worker.gate.order import DEFAULT_METRICS, make_policy

PAGE = {"accept": "text/html"}
ROLLOUT, GATE = "/p/entities/deployment/settings", "/p/entities/evaluations/settings"
CHECKS = '[{"name": "cites a policy", "must_match": "policy \\\\d+"}]'
Stored = Callable[[], dict[str, Any]]


@pytest.fixture
def operator(sign_in: SignIn, project: Project) -> TestClient:
    return sign_in("olga@example.org", "operator")


@pytest.fixture
def stored(sessions: Sessions, project: Project) -> Stored:
    """What the project is configured with now."""

    def read() -> dict[str, Any]:
        with sessions() as session:
            return session.get_one(Project, project.id).config

    return read


def text_of(client: TestClient, path: str) -> str:
    answer = client.get(path, headers=PAGE)
    assert answer.status_code == 200
    return " ".join(answer.text.split())


def audited(sessions: Sessions) -> list[tuple[str, dict[str, Any]]]:
    with sessions() as session:
        query = select(AuditEvent).where(AuditEvent.action == "project.configure").order_by(AuditEvent.id)
        return [(event.actor, event.detail) for event in session.scalars(query)]


# --- the forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["rollout", "gate"])
def test_every_setting_has_a_field_with_words(part: Part) -> None:
    fields = [one for section in setting_form.sections({}, part) for one in section.settings]
    assert {one.name for one in fields} == set(project_settings.shown({}, part))
    assert all(one.label and one.help and one.told for one in fields)


def test_how_candidates_reach_traffic_is_stored_in_the_words_of_the_form(
    operator: TestClient, stored: Stored, sessions: Sessions
) -> None:
    text = text_of(operator, ROLLOUT)
    assert 'placeholder="10"' in text
    assert SIGNALS["implicit"].capitalize() in text
    assert "keeps the settings it started with" in text

    sent = {
        "mode": "canary", "share": "25", "signal": "implicit", "harm": "", "shadow.requests": "200",
        "guardrails.length": "off", "guardrails.errors": "3", "least_users": "10", "score_range": "1, 5",
    }  # fmt: skip
    done = operator.post(ROLLOUT, headers=PAGE, data=sent)

    assert (done.status_code, done.headers["location"]) == (303, f"{ROLLOUT}?saved=1")
    assert stored()["rollout"] == {
        "share": 0.25, "signal": "implicit", "shadow": {"requests": 200}, "score_range": [1.0, 5.0],
        "guardrails": {"length": None, "errors": 0.03},
    }  # fmt: skip
    assert read_rollout(stored()).guardrails.length is None
    text = text_of(operator, f"{ROLLOUT}?saved=1")
    for words in ('value="25"', 'value="off"', 'value="1, 5"', '<option value="implicit" selected>', "Stored. A trial"):
        assert words in text, words
    [(actor, detail)] = audited(sessions)
    assert actor.startswith("user:")
    assert detail["config"]["rollout"]["shadow.requests"] == 200
    assert "mode" not in detail["config"]["rollout"]


def test_sending_the_form_as_it_is_changes_nothing_and_is_no_news(
    operator: TestClient, stored: Stored, sessions: Sessions
) -> None:
    before = stored()
    for path in (ROLLOUT, GATE):
        assert operator.post(path, data={"mode": "canary", "share": "10", "metrics": "exact_match"}).status_code == 303
    assert stored() == before
    assert audited(sessions) == []


def test_a_field_left_empty_takes_its_default_again(operator: TestClient, stored: Stored) -> None:
    operator.post(ROLLOUT, data={"share": "25", "guardrails.length": "off"})
    operator.post(ROLLOUT, data={"share": "", "guardrails.length": ""})
    assert "rollout" not in stored()


@pytest.mark.parametrize(
    ("field", "typed", "words"),
    [
        ("share", "70", "Input should be less than or equal to 50."),
        ("share", "many", "This is no number."),
        ("share", "nan", "This is no number."),
        ("pattern", "([", "This is no regular expression that can be matched in linear time."),
        ("score_range", "5, 1", "The worst score must be below the best."),
        ("guardrails.length", "0.5", "Input should be greater than 1."),
        ("mode", "shadow", "Input should be &#39;canary&#39; or &#39;direct&#39;."),
    ],
)
def test_a_bad_setting_of_the_rollout_is_told_beside_its_field(
    operator: TestClient, stored: Stored, field: str, typed: str, words: str
) -> None:
    wrong = operator.post(ROLLOUT, headers=PAGE, data={field: typed, "freeze_after": "7"})
    assert wrong.status_code == 422
    assert words in wrong.text
    assert 'value="7"' in wrong.text
    assert field == "mode" or f'value="{typed}"' in wrong.text
    assert "rollout" not in stored()
    assert operator.post(ROLLOUT, data={field: typed}).status_code == 400


def test_how_the_gate_scores_is_stored(operator: TestClient, stored: Stored, sessions: Sessions) -> None:
    sent = {
        "metrics": "judge, exact_match", "margin_points": "2.5", "margins": '{"base-ability": 5}', "checks": CHECKS,
        "judge.model": "base", "judge.rubric": "Shorter is\r\nbetter.",
    }  # fmt: skip
    assert operator.post(GATE, headers=PAGE, data=sent).status_code == 303
    found = {key: value for key, value in stored().items() if key in project_settings.GATE}
    assert found == {
        "metrics": ["judge", "exact_match"], "margin_points": 2.5, "margins": {"base-ability": 5.0},
        "checks": [{"name": "cites a policy", "must_match": r"policy \d+"}], "judge": {"rubric": "Shorter is\nbetter."},
    }  # fmt: skip
    text = operator.get(GATE, headers=PAGE).text
    assert "cites a policy" in text
    assert 'value="judge, exact_match"' in text
    assert audited(sessions)[0][1]["config"]["judge.rubric"] == "Shorter is\nbetter."
    assert "An evaluation reads its settings when it begins" in text


@pytest.mark.parametrize(
    ("field", "typed", "words"),
    [
        ("metrics", "vibes", "Number 1: Input should be &#39;exact_match&#39;"),
        (
            "metrics",
            "judge, exact_match",
            "Judge comes first and has nothing to decide by: set judge, or another metric first.",
        ),
        ("metrics", "checks", "Checks comes first and has nothing to decide by: set checks, or another metric first."),
        (
            "metrics",
            "schema_valid",
            "Schema_valid comes first and has nothing to decide by: set response_schema, or another metric first.",
        ),
        ("checks", "[{", "This is no JSON: Expecting property name enclosed in double quotes in line 1, column 3."),
        ("checks", "[" * 30_000, "This is nested too deep."),
        ("checks", '[{"name": "a", "must_match": "(?=x)"}]', "Number 1: must_match: "),
        ("margins", '{"accepted": 120}', "Accepted: Input should be less than or equal to 100."),
        ("judge.model", "other", "Field required."),
        ("response_schema", '{"const": "\\u0000"}', "This holds a character or a number that cannot be stored."),
        ("response_schema", '{"maximum": NaN}', "This holds a character or a number that cannot be stored."),
        ("checks", "<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
    ],
)
def test_a_bad_setting_of_the_gate_is_told_and_what_was_typed_stays(
    operator: TestClient, stored: Stored, field: str, typed: str, words: str
) -> None:
    before = stored()
    wrong = operator.post(GATE, headers=PAGE, data={field: typed, "margin_points": "4"})
    assert wrong.status_code == 422
    assert words in wrong.text
    assert 'value="4"' in wrong.text
    assert "<script>alert" not in wrong.text
    assert stored() == before


def test_what_somebody_else_stored_meanwhile_is_not_overwritten_unseen(operator: TestClient, stored: Stored) -> None:
    text = operator.get(ROLLOUT, headers=PAGE).text
    seen = text.split('name="seen" value="')[1].split('"')[0]
    operator.post(ROLLOUT, data={"share": "25"})
    late = {"seen": seen, "share": "5"}
    assert operator.post(ROLLOUT, data=late).status_code == 409
    again = operator.post(ROLLOUT, headers=PAGE, data=late)
    assert again.status_code == 409
    assert "Somebody changed these settings" in again.text
    assert 'value="5"' in again.text
    assert stored()["rollout"] == {"share": 0.25}
    now = again.text.split('name="seen" value="')[1].split('"')[0]
    assert operator.post(ROLLOUT, data={"seen": now, "share": "5"}).status_code == 303


def test_a_text_beyond_all_measure_is_refused(operator: TestClient) -> None:
    assert operator.post(GATE, data={"checks": " " * 60_000}).status_code == 400


@pytest.mark.parametrize("role", ["viewer", "reviewer", "lead"])
def test_who_is_no_operator_reads_facts(sign_in: SignIn, project: Project, role: str) -> None:
    somebody = sign_in("eve@example.org", role, project.id)
    for path, fact in ((ROLLOUT, "what apps and end users say of answers"), (GATE, "exact_match")):
        text = text_of(somebody, path)
        assert fact in text
        assert "<form class" not in text
        assert somebody.post(path, data={"share": "5"}).status_code == 403


def test_the_pages_lead_to_their_settings(operator: TestClient) -> None:
    assert f'href="{ROLLOUT}"' in text_of(operator, "/p/entities/deployment")
    assert f'href="{GATE}"' in text_of(operator, "/p/entities/evaluations")


# --- what a trial says ------------------------------------------------------------------------------------


def test_a_trial_says_what_it_compares_and_keeps_its_settings(operator: TestClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        trying = seed_rollout.on_trial(session)
    path = "/p/canary/deployment"
    text = text_of(operator, path)
    assert "What apps and end users say of answers" in text
    assert "not before 50 outcomes of 10 users in each arm" in text
    assert "it keeps its own" not in text

    operator.post(f"{path}/settings", data={"signal": "implicit", "freeze_after": "5"})

    text = text_of(operator, path)
    assert "it keeps its own" in text
    assert "What apps and end users say of answers" in text
    assert "A candidate is on trial now" in text_of(operator, f"{path}/settings")
    with sessions.begin() as session:
        rollout = trials.open_of(session, trying.id)
        assert rollout is not None
        assert trials.config_of(rollout).signal == "feedback"
        rollout.verdict = {"action": "wait", "reason": f"no outcome of the candidate yet: {NEEDS['feedback']}"}
        rollout.track = []
    text = text_of(operator, path)
    assert "apps have to send ratings, scores or corrections of its answers to POST /v1/feedback" in text
    assert "What apps and end users say of answers" in text


# --- the API and the command ------------------------------------------------------------------------------


@pytest.fixture
def whet(client: TestClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command with a key of the scope train, on this console."""
    with sessions.begin() as session:
        key = keys.create(session, pepper=PEPPER.encode(), name="t", scopes=["train"])[1]
    headers = {"authorization": f"Bearer {key}"}
    monkeypatch.setenv("WHET_API_KEY", key)
    monkeypatch.setattr(cli_client.httpx, "Client", lambda **_: TestClient(client.app, headers=headers))
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


def test_the_command_shows_and_changes_the_rollout(
    whet: Callable[..., Result], project: Project, stored: Stored, sessions: Sessions
) -> None:
    shown = whet("rollout", "entities")
    assert shown.exit_code == 0, shown.stderr
    assert [line.split() for line in shown.output.splitlines()][1:3] == [["mode", "canary"], ["share", "0.1"]]

    change = ("--set", "share=0.2", "--set", "guardrails.length=off", "--set", "shadow.requests=100")
    assert re.search(r"guardrails.length +off", whet("rollout", "entities", *change).output)
    assert stored()["rollout"] == {"share": 0.2, "guardrails": {"length": None}, "shadow": {"requests": 100}}
    whet("rollout", "entities", "--set", "guardrails.length=null", "--set", "share=null")
    assert stored()["rollout"] == {"shadow": {"requests": 100}}
    assert [actor.startswith("key:") for actor, _ in audited(sessions)] == [True, True]
    for wrong, sentence in (
        ("share=0.9", "rollout.share: Input should be less than or equal to 0.5"), ("surprise=1", "rollout.surprise"),
        ("guardrails.eror=1", "rollout.guardrails.eror"), ("share.x=1", "rollout.share"), ("share", "wants name=value"),
    ):  # fmt: skip
        refused = whet("rollout", "entities", "--set", wrong)
        assert (refused.exit_code, sentence in refused.stderr) == (1, True), wrong


def test_the_command_shows_and_changes_the_gate(
    whet: Callable[..., Result], project: Project, stored: Stored, sessions: Sessions
) -> None:
    assert '["exact_match"]' in whet("gate", "entities").output
    change = ("--set", f"checks={CHECKS}", "--set", "margins.base-ability=5", "--set", "judge.rubric=Shorter is better")
    assert whet("gate", "entities", *change).exit_code == 0
    assert stored()["checks"][0]["name"] == "cites a policy"
    assert stored()["margins"] == {"base-ability": 5.0}
    assert stored()["judge"] == {"rubric": "Shorter is better"}
    whet("gate", "entities", "--set", "judge=null", "--set", "margins.base-ability=null")
    assert {"judge", "margins"} & set(stored()) == set()
    for wrong, sentence in (("tags=[]", "the gate has no setting tags (known: metrics"), ("metrics=[]", "metrics")):
        refused = whet("gate", "entities", "--set", wrong)
        assert (refused.exit_code, sentence in refused.stderr.replace("\n", " ")) == (1, True), wrong


def test_what_another_release_stored_does_not_stand_in_the_way(
    operator: TestClient, project: Project, stored: Stored, sessions: Sessions
) -> None:
    with sessions.begin() as session:
        session.get_one(Project, project.id).config = {"rollout": {"from_another_release": 1, "share": 0.2}}
    assert operator.post(ROLLOUT, data={"signal": "logprob"}).status_code == 303
    assert stored()["rollout"] == {"share": 0.2, "signal": "logprob"}


def test_the_gates_defaults_are_those_it_has() -> None:
    assert project_settings.GATE["metrics"] == list(DEFAULT_METRICS)
    assert make_policy({}) == Policy(
        margin=project_settings.GATE["margin_points"] / 100, min_groups=project_settings.GATE["min_held_out"]
    )


def test_a_guardrail_that_is_switched_off_stays_off(sessions: Sessions, project: Project, stored: Stored) -> None:
    with sessions.begin() as session:
        here = session.get_one(Project, project.id)
        projects.configure(session, here, {"rollout": {"guardrails": {"length": None}}})
    assert read_rollout(stored()).guardrails.length is None
