"""Bulk actions change what their preview counted, nothing else, and an undo puts all of it back."""

import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.errors import Conflict, InvalidRequest
from services.store import bulk, jobs, reviews
from services.store.base import Sessions
from services.store.bulk import Selection
from services.store.models import AuditEvent, BulkAction, BulkChange, Interaction, Job, Project, ReviewItem, UserAccount
from services.store.quality import estimate_quality
from services.store.search import Search
from tests.console import seed
from tests.console.conftest import SignIn
from worker.curation import bulk as work
from worker.curation.split import Chosen, assign


@pytest.fixture
def lead(sessions: Sessions) -> UserAccount:
    with sessions.begin() as session:
        return seed.person(session, "lea@example.org", "lead").user


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "BATCH", 3)


def logged(sessions: Sessions, project: Project, count: int = 8, tags: dict[str, str] | None = None) -> list[uuid.UUID]:
    with sessions.begin() as session:
        return [
            seed.interaction(
                session, project.id, output=f"needle {n}", ago=timedelta(minutes=count - n), tags=tags or {}
            ).id
            for n in range(count)
        ]


def started(
    sessions: Sessions,
    project: Project,
    lead: UserAccount,
    kind: str,
    search: Search,
    ids: list[uuid.UUID],
    tag: str = "",
) -> uuid.UUID:
    with sessions.begin() as session:
        params = bulk.checked(kind, {"tag": tag})
        selection = Selection.frozen(search, ids)
        seen = bulk.preview(session, project.id, kind, params, selection)
        return bulk.start(session, project.id, lead.id, kind, params, selection, seen.found).id


def run(sessions: Sessions, project: Project, action_id: uuid.UUID) -> BulkAction:
    """The action's job to its end, as a worker runs it."""
    with sessions() as session:
        job_id = bulk.get(session, project.id, action_id).job_id
    assert job_id is not None
    lease = jobs.claim(sessions, job_id, "test")
    assert lease is not None
    with lease:
        work.bulk_job(lease, None)  # type: ignore[arg-type]
        assert lease.ended()
    with sessions() as session:
        return bulk.get(session, project.id, action_id)


def undone(sessions: Sessions, project: Project, action_id: uuid.UUID) -> BulkAction:
    with sessions.begin() as session:
        bulk.start_undo(session, project.id, action_id)
    return run(sessions, project, action_id)


def state_of(sessions: Sessions) -> list[Any]:
    """Everything that bulk actions may touch."""
    with sessions() as session:
        items = session.execute(
            select(*(column for column in ReviewItem.__table__.columns)).order_by(ReviewItem.interaction_id)
        ).all()
        return [tuple(row) for row in items] + [
            tuple(row) for row in session.execute(select(Interaction.id, Interaction.tags).order_by(Interaction.id))
        ]


def test_what_is_sent_to_review_waits_without_a_probability_and_an_undo_takes_exactly_it_back(
    sessions: Sessions, project: Project, other: Project, lead: UserAccount
) -> None:
    ids = logged(sessions, project)
    logged(sessions, other, 2)
    with sessions.begin() as session:
        seed.item(session, session.get_one(Interaction, ids[0]))
        session.get_one(Interaction, ids[1]).finish_reason = "error"
    before = state_of(sessions)
    action_id = started(sessions, project, lead, "review", Search(words="needle"), [])
    done = run(sessions, project, action_id)
    assert (done.state, done.expected, done.seen, done.changed) == ("done", 8, 8, 6)
    with sessions() as session:
        items = session.scalars(select(ReviewItem).where(ReviewItem.strategy == "chosen")).all()
        assert {item.interaction_id for item in items} == set(ids[2:])
        assert {item.project_id for item in items} == {project.id}
        assert {item.probability for item in items} == {None}
        sides = assign(session, project.id, [Chosen(item.interaction_id, item.group_key) for item in items], 0.2)
        assert all(item.split == sides[item.interaction_id] for item in items)
        assert estimate_quality(session, project.id) is None
        leased = reviews.lease(session, project.id, lead.id, 5)
        assert leased
    assert undone(sessions, project, action_id).restored == 6
    assert state_of(sessions) == before


def test_an_item_that_was_judged_meanwhile_stays_when_the_rest_is_undone(
    sessions: Sessions, project: Project, lead: UserAccount
) -> None:
    logged(sessions, project, 4)
    action_id = started(sessions, project, lead, "review", Search(), [])
    run(sessions, project, action_id)
    with sessions.begin() as session:
        [held] = reviews.lease(session, project.id, lead.id, 1)
        assert held.lease_token is not None
        reviews.submit(session, project.id, held.id, lead.id, held.lease_token, reviews.Judgement("accept", "k"))
        kept = held.id
    ended = undone(sessions, project, action_id)
    assert (ended.restored, ended.kept) == (3, 1)
    with sessions() as session:
        assert session.scalars(select(ReviewItem.id)).all() == [kept]


def test_tags_come_back_as_they_were_and_those_changed_since_stay(
    sessions: Sessions, project: Project, lead: UserAccount
) -> None:
    ids = logged(sessions, project, 4, tags={"app": "desk"})
    with sessions.begin() as session:
        session.get_one(Interaction, ids[0]).tags = {"batch": "old", "app": "desk"}
        session.get_one(Interaction, ids[1]).tags = {"batch": "new"}
    before = state_of(sessions)
    action_id = started(sessions, project, lead, "tag", Search(), [], tag="batch=new")
    assert run(sessions, project, action_id).changed == 3
    with sessions() as session:
        assert {row.tags["batch"] for row in session.scalars(select(Interaction))} == {"new"}
    undone(sessions, project, action_id)
    assert state_of(sessions) == before
    again = started(sessions, project, lead, "tag", Search(), [], tag="batch=new")
    run(sessions, project, again)
    with sessions.begin() as session:
        session.get_one(Interaction, ids[3]).tags = {"batch": "mine"}
    ended = undone(sessions, project, again)
    assert (ended.restored, ended.kept) == (2, 1)
    with sessions() as session:
        assert session.get_one(Interaction, ids[3]).tags == {"batch": "mine"}


def test_withdrawn_items_reopen_as_they_were(sessions: Sessions, project: Project, lead: UserAccount) -> None:
    ids = logged(sessions, project, 5)
    with sessions.begin() as session:
        for place, one in enumerate(ids):
            seed.item(
                session, session.get_one(Interaction, one), state=("open", "escalated", "done", "open", "open")[place]
            )
    before = state_of(sessions)
    action_id = started(sessions, project, lead, "withdraw", Search(verdict="waiting"), [])
    assert run(sessions, project, action_id).changed == 4
    with sessions() as session:
        assert reviews.lease(session, project.id, lead.id, 5) == []
    undone(sessions, project, action_id)
    assert state_of(sessions) == before


def test_named_answers_are_the_only_ones_and_never_another_projects(
    sessions: Sessions, project: Project, other: Project, lead: UserAccount
) -> None:
    ids, theirs = logged(sessions, project, 5), logged(sessions, other, 1)
    action_id = started(sessions, project, lead, "review", Search(), [ids[1], ids[3], theirs[0]])
    assert run(sessions, project, action_id).changed == 2
    with sessions() as session:
        assert set(session.scalars(select(ReviewItem.interaction_id))) == {ids[1], ids[3]}


def test_what_lands_after_the_preview_is_left_alone(sessions: Sessions, project: Project, lead: UserAccount) -> None:
    logged(sessions, project, 2)
    action_id = started(sessions, project, lead, "tag", Search(window="hour"), [], tag="x")
    with sessions.begin() as session:
        late = seed.interaction(session, project.id, output="needle late", ago=timedelta(seconds=-5)).id
    assert run(sessions, project, action_id).changed == 2
    with sessions() as session:
        assert session.get_one(Interaction, late).tags == {}


def test_a_job_that_was_cut_short_goes_on_and_changes_nothing_twice(
    sessions: Sessions, project: Project, lead: UserAccount
) -> None:
    logged(sessions, project, 8)
    action_id = started(sessions, project, lead, "review", Search(), [])
    with sessions.begin() as session:
        assert work.step(session, action_id)
    with sessions() as session:
        work.step(session, action_id)
        session.rollback()  # killed before the commit
    done = run(sessions, project, action_id)
    assert (done.seen, done.changed) == (8, 8)
    with sessions() as session:
        assert len(session.scalars(select(BulkChange.interaction_id)).all()) == 8


def test_only_a_finished_action_can_be_undone_and_a_lost_job_counts_as_failed(
    sessions: Sessions, project: Project, lead: UserAccount
) -> None:
    logged(sessions, project, 2)
    action_id = started(sessions, project, lead, "review", Search(), [])
    with pytest.raises(Conflict), sessions.begin() as session:
        bulk.start_undo(session, project.id, action_id)
    with sessions.begin() as session:
        job = session.scalars(select(Job)).one()
        job.state, job.error = "dead", "the worker went silent"
    with sessions.begin() as session:
        action = bulk.get(session, project.id, action_id)
        assert (action.state, action.error) == ("failed", "the worker went silent")
        bulk.start_undo(session, project.id, action_id)
    assert run(sessions, project, action_id).state == "undone"


@pytest.mark.parametrize(
    ("kind", "tag"), [("delete", ""), ("tag", ""), ("tag", "=x"), ("tag", "a" * 101), ("tag", "\x00")]
)
def test_an_action_that_says_nothing_is_refused(kind: str, tag: str) -> None:
    with pytest.raises(InvalidRequest):
        bulk.checked(kind, {"tag": tag})


# --- over HTTP --------------------------------------------------------------------------------------------


@pytest.fixture
def as_(sign_in: SignIn) -> Callable[[str], TestClient]:
    return lambda role: sign_in(f"{role}@example.org", role)


def test_only_leads_act_in_bulk_and_each_step_is_audited(
    sessions: Sessions, project: Project, as_: Callable[[str], TestClient]
) -> None:
    ids = logged(sessions, project, 3)
    path = "/p/entities/interactions/bulk"
    reviewer, boss = as_("reviewer"), as_("lead")
    asked = {"do": "review", "scope": "all", "q": "needle", "mode": "words"}
    assert reviewer.get(path, params=asked).status_code == 403
    assert reviewer.post(path, data={"do": "review", "expected": "3"}).status_code == 403
    page = boss.get(path, params=asked, headers={"accept": "text/html"}).text
    assert "data-changing>3<" in page
    assert str(ids[0]) in page
    with sessions() as session:
        assert session.scalars(select(ReviewItem.id)).all() == []
    sent = boss.post(path, data={"do": "review", "query": "q=needle&mode=words", "expected": "3"})
    assert sent.status_code == 303
    action_id = uuid.UUID(sent.headers["location"].rsplit("/", 1)[1])
    assert "queued" in boss.get(sent.headers["location"] + "/live").text
    run(sessions, project, action_id)
    assert boss.post(sent.headers["location"] + "/undo").status_code == 303
    assert boss.post(sent.headers["location"] + "/undo").status_code == 409
    with sessions() as session:
        actions = session.scalars(select(AuditEvent.action).order_by(AuditEvent.id)).all()
    assert [one for one in actions if one.startswith("interactions")] == ["interactions.bulk", "interactions.bulk.undo"]


def test_meaning_cannot_be_acted_on_without_ticks(
    sessions: Sessions, project: Project, as_: Callable[[str], TestClient]
) -> None:
    logged(sessions, project, 1)
    boss = as_("lead")
    for asked in ({"do": "review", "scope": "all", "q": "needle"}, {"do": "review"}, {"do": "x", "scope": "all"}):
        assert boss.get("/p/entities/interactions/bulk", params=asked).status_code == 400
