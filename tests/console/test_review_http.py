"""The endpoints that browsers and simulated reviewers share."""

import re
import uuid
from datetime import timedelta
from typing import Any

from httpx import Response
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from services.console.views import WEB
from services.store.base import Sessions
from services.store.models import Annotation, Interaction, InteractionBody, Project, ReviewItem
from tests.console import seed
from tests.console.conftest import SignIn

LEASE = "/p/entities/review/lease"


def fill(sessions: Sessions, project: Project, *outputs: str, overlap: int = 1) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, outputs, overlap=overlap)


def held(client: TestClient, count: int = 5) -> list[dict[str, Any]]:
    answer = client.post(LEASE, json={"count": count})
    assert answer.status_code == 200
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def send(client: TestClient, item: dict[str, Any], **values: object) -> Response:
    body = {"verdict": "accept", "lease_token": item["lease_token"], "idempotency_key": str(uuid.uuid4())} | values
    return client.post(f"/p/entities/review/items/{item['id']}/annotations", json=body)


def test_a_leased_item_shows_the_answer_and_nothing_that_would_anchor(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    fill(sessions, project, "one")
    [item] = held(sign_in("ada@example.org", "reviewer"))
    assert item["output"] == "one"
    assert item["messages"][0]["role"] == "user"
    told = str(item)
    for hidden in ("uniform", "strategy", "digest", "priority", "split", "interaction_id", seed.BASE):
        assert hidden not in told


def test_what_was_hidden_is_told_with_the_stored_judgement(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    fill(sessions, project, "one")
    client = sign_in("ada@example.org", "reviewer")
    answer = send(client, held(client)[0], verdict="correct", correction="two", tags=["bad JSON"], active_ms=1200)
    assert answer.status_code == 201
    assert answer.json()["strategy"] == "uniform"
    with sessions() as session:
        stored = session.scalars(select(Annotation)).one()
        original = session.scalars(select(InteractionBody.output)).one()
    assert (str(stored.id), stored.correction, stored.tags) == (answer.json()["id"], "two", ["bad JSON"])
    assert original == "one"


def test_an_annotation_submitted_twice_is_stored_once(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    fill(sessions, project, "one")
    client = sign_in("ada@example.org", "reviewer")
    [item] = held(client)
    answers = [send(client, item, idempotency_key="same") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Annotation)) == 1


def test_two_reviewers_on_one_item_get_one_lease(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    fill(sessions, project, "one")
    ada, grace = sign_in("ada@example.org", "reviewer"), sign_in("grace@example.org", "reviewer")
    assert [len(held(ada)), len(held(grace))] == [1, 0]
    assert ada.post(LEASE).json()["items"][0]["output"] == "one"  # no body asks for the usual number


def test_a_lost_lease_answers_409_and_stores_nothing(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    fill(sessions, project, "one")
    ada, grace = sign_in("ada@example.org", "reviewer"), sign_in("grace@example.org", "reviewer")
    [item] = held(ada)
    with sessions.begin() as session:
        session.execute(update(ReviewItem).values(lease_expires_at=func.now() - timedelta(seconds=1)))
    assert len(held(grace)) == 1
    late = send(ada, item)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "lost_lease")
    beat = ada.post(f"/p/entities/review/items/{item['id']}/heartbeat", json={"lease_token": item["lease_token"]})
    assert beat.status_code == 409
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Annotation)) == 0


def test_a_heartbeat_renews_and_a_release_hands_over(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    fill(sessions, project, "one")
    ada, grace = sign_in("ada@example.org", "reviewer"), sign_in("grace@example.org", "reviewer")
    [item] = held(ada)
    with sessions.begin() as session:
        session.execute(update(ReviewItem).values(lease_expires_at=func.now() + timedelta(seconds=1)))
    token = {"lease_token": item["lease_token"]}
    beat = ada.post(f"/p/entities/review/items/{item['id']}/heartbeat", json=token)
    assert beat.json()["lease_expires_at"] >= item["lease_expires_at"]
    assert ada.post(f"/p/entities/review/items/{item['id']}/release", json=token).status_code == 200
    assert len(held(grace)) == 1


def test_undo_gives_the_item_back_and_keeps_both_rows(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    fill(sessions, project, "one")
    client = sign_in("ada@example.org", "reviewer")
    stored = send(client, held(client)[0]).json()
    undone = client.post("/p/entities/review/undo", json={"annotation_id": stored["id"]}).json()
    assert undone["state"] == "open"
    [again] = held(client)
    assert again["lease_token"] == undone["lease_token"]
    assert send(client, again, verdict="reject").status_code == 201
    with sessions() as session:
        verdicts = list(session.scalars(select(Annotation.verdict).order_by(Annotation.id)))
    assert verdicts == ["accept", "undo", "reject"]


def test_progress_counts_what_waits_and_what_is_done(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    fill(sessions, project, "one", "two", "three", overlap=2)
    client = sign_in("ada@example.org", "reviewer")
    send(client, held(client)[0], active_ms=4000)
    told = client.get("/p/entities/review/progress").json()
    assert told == {
        "waiting": 2, "capped": False, "escalated": 0, "disputed": 0, "done_today": 1, "median_seconds": 4.0,
    }  # fmt: skip


def test_an_item_whose_text_is_past_retention_leaves_the_queue(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    fill(sessions, project, "one", "two")
    with sessions.begin() as session:
        session.query(InteractionBody).filter(InteractionBody.output == "one").delete()
    client = sign_in("ada@example.org", "reviewer")
    assert [item["output"] for item in held(client)] == ["two"]
    with sessions() as session:
        assert sorted(session.scalars(select(ReviewItem.state))) == ["open", "withdrawn"]


def test_one_project_never_shows_the_items_of_another(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other", "Another")
        [foreign] = seed.queue(session, other.id, ["secret"])
    client = sign_in("ada@example.org", "reviewer", project.id)
    assert held(client) == []
    token = str(uuid.uuid4())
    assert send(client, {"id": foreign.id, "lease_token": token}).status_code == 404


BAD_BODIES = [
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[]", 422),
    (b"{}", 422),
    (b'{"verdict": "accept", "lease_token": "no uuid", "idempotency_key": "k"}', 422),
    (b'{"verdict": "accept", "surprise": 1}', 422),
    (b'{"a":' * 5000, 400),
    (b"[" * 200_000 + b"]" * 200_000, 400),
]


def test_a_bad_body_is_refused_with_a_sentence(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "reviewer")
    path = f"/p/entities/review/items/{uuid.uuid4()}/annotations"
    for body, status in BAD_BODIES:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, body[:40]
        assert answer.json()["error"]["message"]


def test_a_body_beyond_the_limit_is_refused(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "reviewer")
    answer = client.post(LEASE, content=b" " * 10_000_000, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_reviewing_never_touches_the_log(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    fill(sessions, project, "one")
    with sessions() as session:
        before = session.execute(select(*Interaction.__table__.columns)).all()
    client = sign_in("ada@example.org", "reviewer")
    send(client, held(client)[0], verdict="correct", correction="two")
    with sessions() as session:
        assert session.execute(select(*Interaction.__table__.columns)).all() == before


def test_the_page_names_every_module_its_script_imports(sign_in: SignIn, project: Project) -> None:
    """What it leaves out the browser would find out about in turns."""
    text = sign_in("ada@example.org", "reviewer").get("/p/entities/review").text
    here = WEB / "static" / "review"
    imported = {name for file in here.glob("*.js") for name in re.findall(r'from "\./([\w-]+\.js)"', file.read_text())}
    assert len(imported) > 8
    for name in imported:
        assert f'<link rel="modulepreload" href="/static/review/{name}">' in text
