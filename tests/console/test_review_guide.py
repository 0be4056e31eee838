"""What leads set for a project's reviewers, keys of one's own, and blindness, over HTTP."""

import re
import uuid
from typing import Any

from sqlalchemy import select
from starlette.testclient import TestClient

from services.store import audit
from services.store.base import Sessions
from services.store.models import Annotation, AuditEvent, Project, ReviewItem
from tests.console import seed
from tests.console.conftest import SignIn
from tests.console.test_review_http import held, send

GUIDE = "/p/entities/review/guide"
PAGE = {"accept": "text/html"}


def form(client: TestClient, **values: str) -> dict[str, str]:
    page = client.get(GUIDE, headers=PAGE).text
    [seen] = re.findall(r'name="seen" value="(\w+)"', page)
    return {"seen": seen, "guidelines": "Be kind.", "tags": "rude\n kind \nrude\n\n", "gold_percent": "12.5"} | values


def test_a_lead_sets_guidelines_tags_and_checks(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    lead = sign_in("lea@example.org", "lead")
    assert lead.post(GUIDE, data=form(lead)).status_code == 303
    with sessions() as session:
        config = session.get_one(Project, project.id).config
        events = list(session.scalars(select(AuditEvent.action).where(AuditEvent.action.startswith("review."))))
        assert audit.verify(session).intact
    assert config == {"guidelines": "Be kind.", "tags": ["rude", "kind"], "gold_share": 0.125, "blind_review": False}
    assert events == ["review.guide"]
    assert "Be kind." in lead.get("/p/entities/review", headers=PAGE).text


def test_two_leads_at_once_never_overwrite_each_other(sign_in: SignIn, project: Project) -> None:
    lead = sign_in("lea@example.org", "lead")
    stale = form(lead)
    assert lead.post(GUIDE, data=form(lead, guidelines="First.")).status_code == 303
    assert lead.post(GUIDE, data=stale).status_code == 409
    assert "First." in lead.get(GUIDE, headers=PAGE).text


def test_reviewers_may_neither_see_nor_change_how_they_are_checked(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "reviewer")
    assert client.get(GUIDE).status_code == 403
    assert client.post(GUIDE, data={"seen": "x"}).status_code == 403
    assert client.post(f"/p/entities/review/items/{uuid.uuid4()}/gold").status_code == 403
    assert client.post("/p/entities/review/lease", json={"queue": "disputed"}).status_code == 403


def test_keys_are_kept_per_person(sign_in: SignIn, project: Project) -> None:
    ada, grace = sign_in("ada@example.org", "reviewer"), sign_in("grace@example.org", "reviewer")
    told = ada.put("/p/entities/review/keys", json={"keys": {"accept": "j", "reject": "a"}}).json()["keys"]
    assert (told["accept"], told["reject"], told["skip"]) == ("j", "a", "k")
    assert '<kbd data-key-of="accept">j</kbd>' in ada.get("/p/entities/review", headers=PAGE).text
    assert '<kbd data-key-of="accept">a</kbd>' in grace.get("/p/entities/review", headers=PAGE).text
    assert ada.put("/p/entities/review/keys", json={"keys": {}}).json()["keys"]["accept"] == "a"


def test_keys_that_would_lock_a_reviewer_out_are_refused(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "reviewer")
    for keys in ({"accept": "x"}, {"fly": "y"}, {"accept": "5"}, {"accept": "Enter"}, {"accept": " "}, {"accept": ""}):
        assert client.put("/p/entities/review/keys", json={"keys": keys}).status_code == 422, keys


def pair(sessions: Sessions, project: Project, count: int) -> None:
    with sessions.begin() as session:
        for place in range(count):
            logged = seed.interaction(session, project.id, output="served")
            seed.item(session, logged, priority=place, overlap=2, alternative={"output": "other", "digest": "d" * 64})


def test_sides_are_drawn_for_each_reviewer_and_nothing_sent_tells_them(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    pair(sessions, project, 20)
    client = sign_in("ada@example.org", "reviewer")
    items = held(client, 20)
    assert [one["pair"] for one in held(client, 20)] == [one["pair"] for one in items]  # the same on every look
    lefts = {item["pair"][0] for item in items}
    assert lefts == {"served", "other"}
    assert not any(word in str(items) for word in ("digest", "dddd", "alternative"))
    for item in items:
        assert send(client, item, verdict="prefer", preference="left").status_code == 201
    with sessions() as session:
        stored = {str(row.review_item_id): row.preference for row in session.scalars(select(Annotation))}
    meaning = {"served": "response", "other": "alternative"}
    assert stored == {item["id"]: meaning[item["pair"][0]] for item in items}


def test_looking_back_survives_a_reload_with_the_sides_as_they_were(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    pair(sessions, project, 2)
    client = sign_in("ada@example.org", "reviewer")
    first, second = held(client)
    send(client, first, verdict="prefer", preference="right")
    undone = send(client, second, verdict="prefer", preference="tie").json()["id"]
    client.post("/p/entities/review/undo", json={"annotation_id": undone})
    [back] = client.get("/p/entities/review/history").json()["judged"]
    assert (back["item"]["pair"], back["judgement"]["preference"]) == (first["pair"], "right")


def test_judges_of_a_dispute_are_shown_unnamed(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"], overlap=2)
    for name, verdict in (("ada", "accept"), ("grace", "reject")):
        client = sign_in(f"{name}@example.org", "reviewer")
        send(client, held(client)[0], verdict=verdict, comment="hm")
    lead = sign_in("lea@example.org", "lead")
    [item] = lead.post("/p/entities/review/lease", json={"queue": "disputed"}).json()["items"]
    assert [one["verdict"] for one in item["dispute"]] == ["accept", "reject"]
    assert "ada" not in str(item).lower()
    answer = send(lead, item, verdict="reject", comment="a date is missing")
    assert answer.json()["adjudicates"]
    assert lead.post(f"/p/entities/review/items/{item['id']}/gold").status_code == 200
    page = lead.get(GUIDE, headers=PAGE).text
    assert "Stop checking by it" in page
    assert lead.post(f"{GUIDE}/gold/{item['id']}/remove").status_code == 303
    with sessions() as session:
        assert session.scalars(select(ReviewItem.gold)).one() is None


def test_a_hidden_check_cannot_be_told_from_another_item(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        project.config = project.config | {"gold_share": 0.5}
        session.merge(project)
        [item] = seed.queue(session, project.id, ["known"], overlap=2)
    for name in ("ada", "grace"):
        client = sign_in(f"{name}@example.org", "reviewer")
        send(client, held(client)[0])
    lead = sign_in("lea@example.org", "lead")
    assert lead.post(f"/p/entities/review/items/{item.id}/gold").status_code == 200
    with sessions.begin() as session:
        seed.queue(session, project.id, [f"open {n}" for n in range(20)])
    client = sign_in("alan@example.org", "reviewer")
    items = {one["output"]: one for one in held(client, 20)}
    assert "known" in items  # of 20 draws at a half, none is a million to one
    assert {frozenset(one) for one in items.values()} == {frozenset(items["known"])}
    answers: list[dict[str, Any]] = [send(client, one).json() for one in items.values()]
    assert {(one["state"], one["adjudicates"], one["strategy"]) for one in answers} == {("done", False, "uniform")}
    assert client.get("/p/entities/review/progress").json()["done_today"] == 20


def test_a_project_that_is_not_blind_tells_before_the_judgement(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
    client, lead = sign_in("ada@example.org", "reviewer"), sign_in("lea@example.org", "lead")
    assert held(client)[0]["told"] is None
    lead.post(GUIDE, data=form(lead))  # the box is not ticked
    assert held(client)[0]["told"]["strategy"] == "uniform"
