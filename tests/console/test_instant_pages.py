"""The pages of immediate effect and of erasure: who may do what, what they show, hostile text escaped."""

from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.store import erasure, people, pins, reviews
from services.store.base import Sessions
from services.store.models import ErasureRequest, Pin, Project, ReviewItem
from tests.console import seed
from tests.console.conftest import SignIn

HOSTILE = "<script>alert(1)</script>"
PARAMETERS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 128, "n": 1}


@pytest.fixture
def open_project(sessions: Sessions) -> Project:
    with sessions.begin() as session:
        return seed.project(session, pinned_answers={"enabled": True})


def pinned(sessions: Sessions, project: Project, answer: str = HOSTILE) -> UUID:
    """Corrected by a lead, so pinned."""
    with sessions.begin() as session:
        lead = seed.person(session, f"{uuid4().hex[:6]}@example.org", "lead", project.id).user
        asked = [{"role": "user", "content": f"{HOSTILE} {uuid4()}"}]
        item: ReviewItem = seed.item(session, seed.interaction(session, project.id, output="no", messages=asked))
        item.lease_user_id, item.lease_token = lead.id, uuid4()
        session.flush()
        said = reviews.Judgement(verdict="correct", idempotency_key=uuid4().hex, correction=answer)
        reviews.submit(session, project.id, item.id, lead.id, item.lease_token, said)
        return session.scalars(select(Pin.id).where(Pin.review_item_id == item.id)).one()


def test_the_page_shows_pins_escaped_with_who_approved_them(
    sessions: Sessions, open_project: Project, sign_in: SignIn
) -> None:
    pinned(sessions, open_project)
    page = sign_in("v@example.org", "viewer", open_project.id).get("/p/entities/pins")
    assert page.status_code == 200
    assert HOSTILE not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert ">serving<" in page.text
    assert "Withdraw</button>" not in page.text


def test_a_lead_withdraws_and_switches_and_a_reviewer_does_not(
    sessions: Sessions, open_project: Project, sign_in: SignIn
) -> None:
    pin = pinned(sessions, open_project)
    switch = {"what": "pinned_answers", "enabled": "false"}
    reviewer, lead = (sign_in(f"{role}@example.org", role, open_project.id) for role in ("reviewer", "lead"))
    for path, form in ((f"/p/entities/pins/{pin}/withdraw", {}), ("/p/entities/pins/configure", switch)):
        assert reviewer.post(path, data=form).status_code == 403
        assert lead.post(path, data=form).status_code == 303
    with sessions() as session:
        found = session.get_one(Pin, pin)
        assert (found.state, found.withdrawn_by) == ("withdrawn", "lead@example.org")
        assert session.get_one(Project, open_project.id).config["pinned_answers"] == {"enabled": False}


def test_a_pin_of_another_project_is_not_withdrawn(sessions: Sessions, open_project: Project, sign_in: SignIn) -> None:
    pin = pinned(sessions, open_project)
    with sessions.begin() as session:
        other = seed.project(session, "other")
    lead = sign_in("lead@example.org", "lead", other.id)
    assert lead.post(f"/p/other/pins/{pin}/withdraw").status_code == 404
    with sessions() as session:
        assert session.get_one(Pin, pin).state == "live"


def test_the_pins_api_lists_and_withdraws(
    sessions: Sessions, open_project: Project, client: TestClient, admin_key: str
) -> None:
    pin = pinned(sessions, open_project)
    headers = {"authorization": f"Bearer {admin_key}"}
    listed = client.get("/api/p/entities/pins", headers=headers).json()
    assert [(one["id"], one["state"]) for one in listed["pins"]] == [(str(pin), "live")]
    path = f"/api/p/entities/pins/{pin}/withdraw"
    assert client.post(path, headers=headers, json={"reason": "wrong"}).json()["reason"] == "wrong"
    assert client.post(path, headers=headers, json={}).status_code == 409


def test_what_a_person_withdrew_is_not_pinned_again_by_the_judgement_it_came_from(
    sessions: Sessions, open_project: Project
) -> None:
    pin_id = pinned(sessions, open_project)
    with sessions.begin() as session:
        pin = pins.withdraw(session, open_project.id, pin_id, "lead@example.org", "no")
        item = session.get_one(ReviewItem, pin.review_item_id)
        pins.follow(session, item, reviews.standing_annotations(session, item.id))
        assert pins.used(session, open_project.id).pins == 0


def test_erasure_is_for_admins_and_wants_the_name_twice(sessions: Sessions, project: Project, sign_in: SignIn) -> None:
    with sessions.begin() as session:
        seed.interaction(session, project.id, output="x", end_user="ada")
    operator, admin = (sign_in(f"{role}@example.org", role, project.id) for role in ("operator", "admin"))
    assert operator.get("/p/entities/erasure").status_code == 403
    assert admin.get("/p/entities/erasure").status_code == 200
    form = {"kind": "end_user", "subject": "ada"}
    preview = admin.post("/p/entities/erasure/preview", data=form)
    assert "Answers</dt><dd>1<" in preview.text
    assert admin.post("/p/entities/erasure", data={**form, "confirmed": "bob"}).status_code == 422
    assert admin.post("/p/entities/erasure", data={**form, "confirmed": "ada"}).status_code == 303
    with sessions.begin() as session:
        made = session.scalars(select(ErasureRequest)).one()
        boss = people.find_user(session, "admin@example.org").id  # a certificate is hashed, so it names nobody
        assert (made.subject, made.state, made.asked_by) == ("ada", "queued", f"user:{boss}")
        made.state, made.certificate = "done", {"hash": "h"}
    found = admin.get(f"/p/entities/erasure/{made.id}/certificate")
    assert found.json() == {"hash": "h"}
    assert found.headers["content-disposition"] == f'attachment; filename="erasure-{made.id}.json"'
    assert "Certificate</a>" in admin.get("/p/entities/erasure").text


def test_the_erasure_api_keeps_keys_to_their_project(
    sessions: Sessions, project: Project, client: TestClient, admin_key: str
) -> None:
    headers = {"authorization": f"Bearer {admin_key}"}
    body = {"kind": "session", "subject": "s-1", "project": "entities"}
    assert client.post("/api/erasures/preview", headers=headers, json=body).json()["rows"]["interaction"] == 0
    made = client.post("/api/erasures", headers=headers, json=body)
    assert (made.status_code, made.json()["state"]) == (202, "queued")
    assert client.post("/api/erasures", headers=headers, json=body).status_code == 409
    shown = client.get(f"/api/erasures/{made.json()['id']}", headers=headers).json()
    assert (shown["step"], shown["certificate"]) == ("queued", None)
    with sessions() as session:
        assert [one.subject for one in erasure.list_(session, project.id)] == ["s-1"]
