"""The evaluation pages, the API's part on them, and overrides through both."""

from collections.abc import Callable

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.store import evaluations, keys, power, revisions
from services.store.base import Sessions
from services.store.models import AuditEvent, Evaluation, Job, Project, Revision, Run
from tests.console import seed, seed_evaluation
from tests.console.conftest import PEPPER, SignIn
from worker.gate.decide import Policy
from worker.gate.looks import Budget

PAGE = {"accept": "text/html"}
REASON = "The metric punishes the new date format."


@pytest.fixture
def compared(sessions: Sessions, project: Project) -> list[Evaluation]:
    with sessions.begin() as session:
        return seed_evaluation.compared(session, session.merge(project))


def text_of(client: TestClient, path: str) -> str:
    answer = client.get(path, headers=PAGE)
    assert answer.status_code == 200, answer.text
    return answer.text


def test_the_list_and_the_page_say_what_was_decided_and_why(
    sign_in: SignIn, project: Project, compared: list[Evaluation]
) -> None:
    reader = sign_in("ada@example.org", "viewer", project.id)

    listed = text_of(reader, "/p/entities/evaluations")
    shown = text_of(reader, f"/p/entities/evaluations/{compared[-1].id}")

    assert listed.count("refused</span>") == 2
    assert listed.count("passed</span>") == 2
    for expected in (
        "Refused: what served stays", "Not shown to be better on what was corrected", "what was right already",
        "number 4, at level 0.015", "at level 0.00167", "more would decide", "no semicolons".capitalize(), "κ 0.46",
        "27 turned with the order", "scored by people <b>34</b>", "by people",
    ):  # fmt: skip
        assert expected in shown
    assert shown.count('class="margin"') == 2
    assert "Override the gate" not in shown
    assert "handed on by a promotion" not in shown
    assert text_of(reader, f"/p/entities/evaluations/{compared[2].id}").count("<article") == 20


def test_the_headline_claims_no_more_than_its_slices_show(
    sign_in: SignIn, project: Project, compared: list[Evaluation]
) -> None:
    reader, promoted = sign_in("ada@example.org", "viewer", project.id), compared[2]
    words = "Passed the gate: better on what was corrected; no evident harm on accepted and base-ability, with too few"

    assert words in text_of(reader, f"/p/entities/evaluations/{promoted.id}")
    assert words in text_of(reader, f"/p/entities/runs/{promoted.run_id}")


def test_a_comparison_that_tested_nothing_shows_no_look(
    sign_in: SignIn, project: Project, sessions: Sessions, compared: list[Evaluation]
) -> None:
    reader = sign_in("ada@example.org", "viewer", project.id)
    spent = '<td class="num hide-tablet">4</td>'
    assert spent in text_of(reader, "/p/entities/evaluations")
    with sessions.begin() as session:
        untested = session.get_one(Evaluation, compared[3].id)
        untested.summary = {**untested.summary, "tested": False}

    assert spent not in text_of(reader, "/p/entities/evaluations")
    assert text_of(reader, f"/p/entities/evaluations/{untested.id}").count("no look spent") == 1
    assert "no look spent" in text_of(reader, f"/p/entities/runs/{untested.run_id}")


def test_a_level_that_was_handed_on_is_told(
    sign_in: SignIn, project: Project, sessions: Sessions, compared: list[Evaluation]
) -> None:
    with sessions.begin() as session:
        revisions.count_look(session, compared[-1].revision_id, 0.0125)
        revision = session.get_one(Revision, compared[-1].revision_id)
        assert (revision.looks, revision.look_carry) == (5, 0.0125)

    shown = text_of(sign_in("ada@example.org", "viewer"), f"/p/entities/evaluations/{compared[-1].id}")

    assert "at level 0.0137, 0.0125 of it handed on by a promotion" in shown


def test_rows_are_filtered_by_outcome_and_slice_and_come_in_pages(
    sign_in: SignIn, project: Project, compared: list[Evaluation]
) -> None:
    reader, page = sign_in("ada@example.org", "viewer", project.id), f"/p/entities/evaluations/{compared[2].id}"

    wins = text_of(reader, f"{page}?outcome=win&slice=target")
    general = text_of(reader, f"{page}?slice=base-ability&start=20")
    nothing = text_of(reader, f"{page}?slice=no-such-slice")

    assert wins.count('class="pill ok">better</span><span title') == 20
    assert "worse</span><span title" not in wins
    assert general.count("<article") == 20
    assert "21 to 40 of 40" in general
    assert "by similarity" in general
    assert "No row like this" in nothing
    assert reader.get(f"{page}?outcome=draw", headers=PAGE).status_code == 422


def test_another_projects_evaluation_is_not_shown(
    sign_in: SignIn, sessions: Sessions, project: Project, compared: list[Evaluation]
) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other", "Other")
    reader = sign_in("ada@example.org", "admin")

    assert reader.get(f"/p/other/evaluations/{compared[0].id}", headers=PAGE).status_code == 404
    assert reader.post(f"/p/other/evaluations/{compared[0].id}/override", data={"reason": REASON}).status_code == 404
    assert text_of(reader, "/p/other/evaluations").count("No evaluation yet") == 1
    assert other.slug == "other"


def test_only_operators_override_and_everybody_sees_it(
    sign_in: SignIn, sessions: Sessions, project: Project, compared: list[Evaluation]
) -> None:
    refused = compared[-1]
    path = f"/p/entities/evaluations/{refused.id}"
    lead = sign_in("lead@example.org", "lead", project.id)
    operator = sign_in("op@example.org", "operator", project.id)

    forbidden = lead.post(f"{path}/override", data={"reason": REASON})
    silent = operator.post(f"{path}/override", data={"reason": "because"})
    assert "Override the gate" in text_of(operator, path)
    done = operator.post(f"{path}/override", data={"reason": REASON}, headers=PAGE)
    again = operator.post(f"{path}/override", data={"reason": REASON})

    assert (forbidden.status_code, silent.status_code) == (403, 400)
    assert (done.status_code, again.status_code) == (303, 409)
    for shown in (path, "/p/entities/deployment", f"/p/entities/runs/{refused.run_id}"):
        assert REASON in text_of(lead, shown)
        assert "op@example.org" in text_of(lead, shown)
    assert "refused, overridden" in text_of(lead, "/p/entities/evaluations")
    with sessions() as session:
        job = session.scalars(select(Job).where(Job.kind == "deploy")).one()
        run = session.get_one(Run, refused.run_id)
        actions = session.scalars(select(AuditEvent.action)).all()
    assert job.payload["digest"] == refused.candidate_digest
    assert (run.state, run.phase) == ("running", "deploying")
    assert {"evaluation.override", "deployment.override"} <= set(actions)


def test_what_was_promoted_has_nothing_to_override(
    sign_in: SignIn, project: Project, compared: list[Evaluation]
) -> None:
    operator = sign_in("op@example.org", "operator", project.id)

    answer = operator.post(f"/p/entities/evaluations/{compared[2].id}/override", data={"reason": REASON})

    assert answer.status_code == 409


@pytest.fixture
def key_client(client: TestClient, sessions: Sessions, project: Project) -> Callable[[list[str]], TestClient]:
    def made(scopes: list[str]) -> TestClient:
        with sessions.begin() as session:
            key = keys.create(session, pepper=PEPPER.encode(), name="k", scopes=scopes, project_id=project.id)[1]
        return TestClient(client.app, base_url="http://console", headers={"authorization": f"Bearer {key}"})

    return made


def test_the_api_lists_evaluations_and_overrides_by_run(
    key_client: Callable[[list[str]], TestClient], sessions: Sessions, project: Project, compared: list[Evaluation]
) -> None:
    trainer, refused = key_client(["train"]), compared[-1]
    path = f"/api/runs/{refused.run_id}/override"

    assert key_client(["infer"]).post(path, json={"reason": REASON}).status_code == 403
    assert trainer.post(path, json={"reason": "no"}).status_code == 400
    assert trainer.post(path, json={}).status_code == 422
    assert trainer.post(path, json={"reason": REASON}).json()["phase"] == "deploying"
    assert trainer.post(path, json={"reason": REASON}).status_code == 409
    listed = trainer.get("/api/p/entities/evaluations").json()["evaluations"]

    assert [one["decision"] for one in listed] == ["refuse", "promote", "promote", "refuse"]
    assert listed[0]["override_reason"] == REASON
    with sessions.begin() as session:
        undecided = seed_evaluation._run
        other = seed.project(session, "other", "Other")
        run = undecided(session, other, session.get_one(Revision, refused.revision_id))
    assert trainer.post(f"/api/runs/{run.id}/override", json={"reason": REASON}).status_code == 404


def test_the_interaction_page_leads_to_the_evaluations_that_tested_with_it(
    sign_in: SignIn, lived_in: Project, sessions: Sessions
) -> None:
    with sessions() as session:
        found = session.scalars(select(Evaluation)).all()
        ids = [pair.example.interaction_id for pair in evaluations.rows(session, found[0].id)]
    reader = sign_in("boss@example.org", "admin")

    shown = text_of(reader, f"/p/{lived_in.slug}/interactions/{ids[0]}")

    assert all(f"/evaluations/{one.id}" in shown for one in found)


def test_the_page_tells_the_same_budget_as_the_gate_keeps() -> None:
    assert power.level(3, 0.01) == Budget(Policy().alpha).level(3, 0.01)
