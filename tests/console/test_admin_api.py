"""The JSON API: what the CLI asks for, and everything it must refuse."""

import re
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from services.cli import app as cli_app
from services.errors import Conflict
from services.store import keys, people, speculators
from services.store.base import Sessions
from services.store.models import Artifact, AuditEvent, Job, Project, Run
from tests.console import seed, seed_speed
from tests.console.conftest import PEPPER

MakeApi = Callable[..., TestClient]


@pytest.fixture
def api_of(client: TestClient, sessions: Sessions) -> MakeApi:
    """`api_of(["train"], project.id)` is a client with such a key."""

    def made(scopes: Sequence[str], project_id: UUID | None = None) -> TestClient:
        with sessions.begin() as session:
            _, key = keys.create(session, pepper=PEPPER.encode(), name="t", scopes=scopes, project_id=project_id)
        other = TestClient(client.app, base_url="http://console")
        other.headers["authorization"] = f"Bearer {key}"
        return other

    return made


@pytest.fixture
def admin(api_of: MakeApi) -> TestClient:
    return api_of(["admin"])


# --- the happy path ---------------------------------------------------------------------------------------


def test_a_run_is_started_followed_and_cancelled(api_of: MakeApi, project: Project) -> None:
    trainer = api_of(["train"])
    started = trainer.post("/api/p/entities/runs", json={"params": {"epochs": 1}})
    assert started.status_code == 201
    run = started.json()
    assert (run["state"], run["params"]["epochs"]) == ("queued", 1)
    assert trainer.post("/api/p/entities/runs", json={}).status_code == 409
    shown = trainer.get(f"/api/runs/{run['id']}").json()
    assert [event["kind"] for event in shown["events"]] == ["phase", "trigger"]
    newest = shown["events"][-1]["id"]
    assert trainer.get(f"/api/runs/{run['id']}?after={newest}").json()["events"] == []
    assert trainer.post(f"/api/runs/{run['id']}/cancel").json()["state"] == "cancelled"
    assert trainer.post(f"/api/runs/{run['id']}/cancel").status_code == 409
    assert [row["id"] for row in trainer.get("/api/p/entities/runs").json()["runs"]] == [run["id"]]


def test_every_kind_is_started_with_its_parameters_and_tried_again(api_of: MakeApi, project: Project) -> None:
    trainer = api_of(["train"])
    sent = {"kind": "dpo", "params": {"beta": 0.3, "sweep": 4}}
    run = trainer.post("/api/p/entities/runs", json=sent).json()
    assert (run["kind"], run["params"]["beta"], run["params"]["sweep"]) == ("dpo", 0.3, 4)
    assert trainer.post(f"/api/runs/{run['id']}/retry").status_code == 409
    trainer.post(f"/api/runs/{run['id']}/cancel")

    again = trainer.post(f"/api/runs/{run['id']}/retry")

    assert again.status_code == 201
    assert again.json()["params"] == run["params"]
    [trigger] = [
        event for event in trainer.get(f"/api/runs/{again.json()['id']}").json()["events"] if event["kind"] == "trigger"
    ]
    assert trigger["payload"] == {"line": "retry 1 of 3", "retry_of": run["id"], "root": run["id"]}


def test_triggers_are_shown_and_changed_key_by_key(api_of: MakeApi, project: Project) -> None:
    trainer, path = api_of(["train"]), "/api/p/entities/triggers"
    assert trainer.get(path).json()["examples"] == 0
    trainer.put(path, json={"examples": 200, "daily_at": "03:00"})

    assert trainer.put(path, json={"daily_at": None, "kind": "dpo"}).json() == trainer.get(path).json()
    assert trainer.get(path).json() == {
        "kind": "dpo", "examples": 200, "every_hours": 0, "daily_at": "", "drift_points": 0, "min_minutes": 60,
    }  # fmt: skip
    assert trainer.put(path, json={"weekly": 1}).status_code == 400


def test_datasets_and_sampling_are_queued_once(api_of: MakeApi, sessions: Sessions, project: Project) -> None:
    trainer = api_of(["train"])
    for path in ("/api/p/entities/datasets/golden/build", "/api/p/entities/sample"):
        first = trainer.post(path)
        assert first.status_code == 202
        assert trainer.get(f"/api/jobs/{first.json()['id']}").json()["state"] == "queued"
        assert trainer.post(path).status_code == 409
    with sessions() as session:
        assert sorted(session.scalars(select(Job.kind))) == ["dataset.build", "review.sample"]


@pytest.mark.usefixtures("lived_in")
def test_a_lived_in_project_is_told_in_full(api_of: MakeApi, sessions: Sessions) -> None:
    trainer = api_of(["train"])
    dataset = trainer.get("/api/p/entities/datasets/golden").json()
    assert len(dataset["revisions"]) == 2
    assert dataset["counts"]["train"]
    assert trainer.get("/api/p/entities/datasets").json()["datasets"][0]["name"] == "golden"
    deployment = trainer.get("/api/p/entities/deployment").json()
    assert deployment["generation"] == 2
    assert [event["kind"] for event in deployment["events"]] == ["flip", "staged", "verified"]
    back = trainer.post("/api/p/entities/deployment/rollback", json={"reason": "worse"}).json()
    assert (back["generation"], back["active_digest"]) == (3, None)
    assert trainer.post("/api/p/entities/deployment/rollback", json={}).status_code == 409
    with sessions() as session:
        promoted = session.scalars(select(Run.id).where(Run.phase == "rolled back")).one()
    assert trainer.get(f"/api/runs/{promoted}").json()["evaluation"]["decision"] == "promote"


def test_an_invited_person_can_sign_in_with_the_role_given(
    admin: TestClient, client: TestClient, project: Project
) -> None:
    body = {"email": "Ada@Example.org", "name": "Ada", "role": "reviewer", "project": "entities"}
    invited = admin.post("/api/users", json=body)
    assert invited.status_code == 201
    path = invited.json()["sign_in_url"].removeprefix("http://console")
    assert client.post(path, follow_redirects=False).status_code == 303
    assert client.post("/p/entities/review/lease", json={}).status_code == 200
    assert client.post("/p/entities/runs").status_code == 403
    again = admin.post("/api/users/link", json={"email": "ada@example.org"})
    assert again.json()["id"] == invited.json()["id"]
    assert again.json()["sign_in_url"] != invited.json()["sign_in_url"]
    assert admin.post("/api/users/link", json={"email": "nobody@example.org"}).status_code == 404


def test_a_key_is_shown_once_and_stops_when_revoked(
    admin: TestClient, client: TestClient, sessions: Sessions, project: Project
) -> None:
    made = admin.post("/api/keys", json={"name": "ci", "scopes": ["train"], "project": "entities"}).json()
    bearer = {"authorization": f"Bearer {made['key']}"}
    assert client.get("/api/p/entities/runs", headers=bearer).status_code == 200
    assert made["key"] not in admin.get("/api/keys").text
    assert admin.delete(f"/api/keys/{made['id']}").json()["revoked_at"]
    assert client.get("/api/p/entities/runs", headers=bearer).status_code == 401
    with sessions() as session:
        told = session.execute(select(AuditEvent.action, AuditEvent.detail)).all()
    assert [row.action for row in told] == ["key.create", "key.revoke"]
    assert made["key"] not in str(told)


def test_projects_are_made_and_listed(admin: TestClient) -> None:
    assert admin.post("/api/projects", json={"slug": "new", "name": "New"}).status_code == 201
    assert admin.post("/api/projects", json={"slug": "new"}).status_code == 409
    assert admin.post("/api/projects", json={"slug": "Not A Slug"}).status_code == 400
    assert [row["slug"] for row in admin.get("/api/projects").json()["projects"]] == ["new"]


def test_heads_are_shown_tried_and_taken_back_by_hand(api_of: MakeApi, sessions: Sessions, project: Project) -> None:
    one, two = "1" * 64, "2" * 64
    with sessions.begin() as session:
        for digest in (one, two):
            made = {"kind": "speculator", "base_digest": "b", "manifest": {"adapter": None}}
            session.add(Artifact(digest=digest, project_id=project.id, **made))
        session.flush()
        speculators.stage_canary(session, project.id, one, 0.5, speculators.Decision("test", "t", {}))
    trainer, path = api_of(["train"]), "/api/p/entities/speculator"
    told = trainer.get(path).json()
    assert (told["live"], told["canary"], told["share"]) == (None, one, 0.5)
    assert told["config"]["first_tokens"] == 50_000
    assert (told["gain"], told["drafters"]) == (None, [])

    assert trainer.post(f"{path}/promote", json={"generation": 7}).status_code == 409
    assert trainer.post(f"{path}/promote", json={}).json()["live"] == one
    assert trainer.post(f"{path}/promote", json={}).status_code == 409
    with sessions.begin() as session:
        speculators.stage_canary(session, project.id, two, 0.5, speculators.Decision("test", "t", {}))
    assert trainer.post(f"{path}/withdraw", json={}).json()["canary"] is None
    assert trainer.post(f"{path}/rollback", json={"reason": "worse"}).json()["live"] is None
    assert trainer.post(f"{path}/rollback", json={}).status_code == 409
    assert trainer.post(f"{path}/retire", json={}).status_code == 409
    kinds = [(event["kind"], event["reason"]) for event in trainer.get(path).json()["events"]]
    assert kinds[0] == ("speculator_rolled_back", "worse")
    assert len(kinds) == 5
    assert api_of(["infer", "feedback", "review"]).get(path).status_code == 403
    assert api_of(["train"], project.id).get("/api/p/other/speculator").status_code == 404


def test_the_command_line_shows_the_heads_and_what_they_earn(
    api_of: MakeApi, sessions: Sessions, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = api_of(["train"])

    class Through:
        """The CLI's client, to the application under test."""

        def __init__(self, _settings: object) -> None: ...

        def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
            return trainer.get(path).json()

        def post(self, path: str, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
            answer = trainer.post(path, json=body)
            if answer.is_error:
                raise Conflict(answer.json()["error"]["message"])
            return answer.json()

    monkeypatch.setattr("services.cli_learning.AdminClient", Through)
    with sessions.begin() as session:
        seed_speed.sped_up(session, session.get_one(Project, project.id))

    shown = whet("speculator", "entities").output
    assert re.search(r"drafts with heads \w{12}  tries heads \w{12} on 25%", shown)
    assert "times as fast as without drafts" in shown
    assert "accepted 2.31 tokens a step" in shown
    assert "tries" not in whet("speculator", "entities", "promote").output
    assert whet("speculator", "entities", "roll-back").exit_code == 0
    assert "drafts with the suffix drafter" in whet("speculator", "entities", "retire").output
    for action, sentence in (("retire", "works alone already"), ("explode", "no action 'explode': status, roll-back")):
        refused = whet("speculator", "entities", action)
        assert (refused.exit_code, sentence in refused.stderr) == (1, True)


def whet(*arguments: str) -> Result:
    return CliRunner().invoke(cli_app, list(arguments))


# --- refusals ---------------------------------------------------------------------------------------------


def test_without_a_live_key_nothing_is_told(client: TestClient, project: Project) -> None:
    unknown = f"Bearer wh_abcdefgh_{'x' * 43}"
    for header in ("", "Basic dXNlcg==", "Bearer", "Bearer wh_short", unknown, "Bearer ключ"):
        answer = client.get("/api/projects", headers={"authorization": header.encode()})  # type: ignore[dict-item]
        assert answer.status_code == 401, header
        assert answer.json()["error"]["type"] == "authentication_error"


def test_a_session_cookie_is_no_api_key(client: TestClient, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        token = seed.person(session, "boss@example.org", "admin").token
    client.post(f"/sign-in/{token}", follow_redirects=False)
    assert client.get("/api/projects").status_code == 401


def test_a_key_without_the_scope_is_refused(api_of: MakeApi, project: Project) -> None:
    apps, trainer = api_of(["infer", "feedback", "review"]), api_of(["train"])
    assert apps.get("/api/p/entities/runs").status_code == 403
    assert trainer.post("/api/keys", json={"name": "x", "scopes": ["admin"]}).status_code == 403
    assert trainer.post("/api/users", json={"email": "a@b.c"}).status_code == 403


def test_a_key_of_one_project_reaches_nothing_beyond_it(api_of: MakeApi, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other", "Another")
        run = Run(project_id=other.id, kind="sft", params={}, created_by="x")
        job = Job(kind="heartbeat", payload={}, project_id=other.id)
        session.add_all([run, job])
        session.flush()
        insider = seed.person(session, "both@example.org", "admin", other.id).user.email
        everywhere = seed.person(session, "boss@example.org", "admin").user.email
        foreign = keys.create(session, pepper=PEPPER.encode(), name="f", scopes=["train"], project_id=other.id)[0].id
    local = api_of(["admin"], project.id)
    assert [row["slug"] for row in local.get("/api/projects").json()["projects"]] == ["entities"]
    refused = [
        local.post("/api/projects", json={"slug": "mine"}),
        local.post("/api/keys", json={"name": "x", "scopes": ["admin"]}),
        local.post("/api/users", json={"email": "a@b.cd", "role": "admin"}),
        local.post("/api/users", json={"email": insider, "project": "entities"}),
        local.post("/api/users", json={"email": everywhere, "project": "entities"}),
        local.post("/api/users/link", json={"email": everywhere}),
    ]
    assert [answer.status_code for answer in refused] == [403] * len(refused)
    hidden = [
        local.get(f"/api/runs/{run.id}"),
        local.post(f"/api/runs/{run.id}/cancel"),
        local.post(f"/api/runs/{run.id}/retry"),
        local.get(f"/api/jobs/{job.id}"),
        local.delete(f"/api/keys/{foreign}"),
        local.get("/api/p/other/runs"),
        local.get("/api/p/other/deployment"),
        local.post("/api/p/other/runs", json={}),
        local.post("/api/keys", json={"name": "x", "scopes": ["admin"], "project": "other"}),
    ]
    assert [answer.status_code for answer in hidden] == [404] * len(hidden)
    unheard = local.get("/api/p/unheard/runs")
    assert unheard.status_code == 404
    assert unheard.text.replace("unheard", "other") == local.get("/api/p/other/runs").text
    assert str(foreign) not in local.get("/api/keys").text
    with sessions() as session:
        assert people.role_on(session, people.find_user(session, insider).id, project.id) is None


def test_bad_requests_get_the_right_status_and_a_sentence(admin: TestClient, project: Project) -> None:
    answers = {
        admin.get("/api/p/nowhere/runs"): 404,
        admin.get(f"/api/runs/{uuid4()}"): 404,
        admin.get("/api/runs/not-an-id"): 422,
        admin.get("/api/p/entities/datasets/missing"): 404,
        admin.get("/api/p/entities/datasets/..%2f..%2fetc"): 404,
        admin.get("/api/p/entities/runs?limit=0"): 422,
        admin.post("/api/p/entities/runs", json={"params": {"rank": 0}}): 400,
        admin.post("/api/p/entities/runs", json={"params": {"command": "rm"}}): 400,
        admin.post("/api/p/entities/runs", json={"kind": "grpo"}): 400,
        admin.post("/api/p/entities/runs", json={"kind": "kto", "params": {"batch_size": 1}}): 400,
        admin.post("/api/p/entities/runs", json={"kind": "sft", "params": {"beta": 0.1}}): 400,
        admin.post(f"/api/runs/{uuid4()}/retry"): 404,
        admin.post("/api/p/entities/runs", json={"surprise": 1}): 422,
        admin.post("/api/p/entities/runs", json={"dataset": "a\x00b"}): 422,
        admin.post("/api/p/entities/runs", json={"params": {"replay_from": "a\x00b"}}): 400,
        admin.post("/api/p/entities/runs", content=b"{", headers={"content-type": "application/json"}): 400,
        admin.post("/api/users", json={"email": "not an address"}): 400,
        admin.post("/api/users", json={"email": "a@b.cd", "role": "god"}): 400,
        admin.post("/api/keys", json={"name": "x", "scopes": ["everything"]}): 400,
        admin.post("/api/keys", json={"name": " ", "scopes": ["train"]}): 400,
        admin.delete(f"/api/keys/{uuid4()}"): 404,
        admin.post("/api/p/entities/deployment/rollback", json={}): 409,
    }
    wrong = [(a.request.url, a.status_code, expected) for a, expected in answers.items() if a.status_code != expected]
    assert wrong == []
    assert all(answer.json()["error"]["message"] for answer in answers)
