"""The queue's promises, asked of the store itself: exclusive leases, exact overlap, appended judgements."""

import threading
import uuid
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound, Unprocessable, WhetError
from services.store import reviews
from services.store.base import Sessions
from services.store.models import Annotation, Project, ReviewItem
from services.store.reviews import Judgement, LostLease
from tests.console import seed


def judgement(verdict: str = "accept", **values: object) -> Judgement:
    return Judgement(verdict, str(uuid.uuid4()), **values)  # type: ignore[arg-type]


def people(session: Session, count: int) -> list[uuid.UUID]:
    return [seed.person(session, f"reviewer{n}@example.org", "reviewer").user.id for n in range(count)]


def judge(session: Session, project: Project, user: uuid.UUID, held: ReviewItem, **values: object) -> Annotation:
    assert held.lease_token is not None
    sent = judgement(**values)  # type: ignore[arg-type]
    return reviews.submit(session, project.id, held.id, user, held.lease_token, sent).annotation


def test_two_reviewers_never_hold_one_item(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one", "two", "three"])
        ada, grace = people(session, 2)
    with (
        sessions.begin() as first,
        sessions.begin() as second,
    ):  # both transactions open: rows locked by one are skipped
        of_ada = {item.id for item in reviews.lease(first, project.id, ada, 2)}
        of_grace = {item.id for item in reviews.lease(second, project.id, grace, 5)}
    assert len(of_ada) == 2
    assert len(of_grace) == 1
    assert not of_ada & of_grace


def test_leasing_again_returns_the_same_items_and_tokens(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one", "two"])
        [ada] = people(session, 1)
    with sessions.begin() as session:
        before = {item.id: item.lease_token for item in reviews.lease(session, project.id, ada, 5)}
    with sessions.begin() as session:
        after = {item.id: item.lease_token for item in reviews.lease(session, project.id, ada, 5)}
    assert before == after
    assert len(after) == 2


def test_an_expired_lease_goes_to_the_next_reviewer_and_is_lost_to_the_first(
    sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
        ada, grace = people(session, 2)
        [held] = reviews.lease(session, project.id, ada)
    with sessions.begin() as session:
        session.execute(update(ReviewItem).values(lease_expires_at=func.now() - timedelta(seconds=1)))
    with sessions.begin() as session:
        assert [item.id for item in reviews.lease(session, project.id, grace)] == [held.id]
    with sessions.begin() as session, pytest.raises(LostLease):
        judge(session, project, ada, held)
    token = held.lease_token or uuid.uuid4()
    with sessions.begin() as session, pytest.raises(LostLease):
        reviews.heartbeat(session, project.id, held.id, ada, token)


def test_an_expired_lease_nobody_took_still_accepts_the_work(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
        [ada] = people(session, 1)
        [held] = reviews.lease(session, project.id, ada)
        session.execute(update(ReviewItem).values(lease_expires_at=func.now() - timedelta(minutes=5)))
    with sessions.begin() as session:
        judge(session, project, ada, held)
        assert session.get_one(ReviewItem, held.id).state == "done"


def test_a_submit_sent_twice_is_stored_once(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
        [ada] = people(session, 1)
        [held] = reviews.lease(session, project.id, ada)
    token, sent = held.lease_token, judgement()
    assert token is not None
    answers = []
    for _ in range(2):
        with sessions.begin() as session:
            answers.append(reviews.submit(session, project.id, held.id, ada, token, sent))
    assert [answer.replayed for answer in answers] == [False, True]
    assert answers[0].annotation.id == answers[1].annotation.id
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(Annotation)) == 1


def test_a_key_used_for_another_item_is_refused(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one", "two"])
        [ada] = people(session, 1)
        first, second = reviews.lease(session, project.id, ada)
    sent = judgement()
    one, two = first.lease_token, second.lease_token
    assert one is not None
    assert two is not None
    with sessions.begin() as session:
        reviews.submit(session, project.id, first.id, ada, one, sent)
    with sessions.begin() as session, pytest.raises(Conflict, match="another judgement"):
        reviews.submit(session, project.id, second.id, ada, two, sent)


def race(attempts: int, work: Callable[[int], None]) -> list[Exception]:
    """Run `work` in as many threads at once; what they raised."""
    raised: list[Exception] = []
    gate = threading.Barrier(attempts)

    def run(index: int) -> None:
        gate.wait()
        try:
            work(index)
        except WhetError as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(attempts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_overlap_is_exact_when_everybody_judges_at_once(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, [f"answer {n}" for n in range(4)], overlap=2)
        everybody = people(session, 6)

    def review_everything(index: int) -> None:
        user = everybody[index]
        while True:
            with sessions.begin() as session:
                held = reviews.lease(session, project.id, user, 2)
            if not held:
                return
            for item in held:
                with sessions.begin() as session:
                    judge(session, project, user, item)

    raised: list[Exception] = []
    for _ in range(3):  # an item skipped while locked shows up in the next round
        raised += race(6, review_everything)
    assert raised == []
    with sessions.begin() as session:
        counted = session.execute(
            select(Annotation.review_item_id, func.count(), func.count(Annotation.author_id.distinct())).group_by(
                Annotation.review_item_id
            )
        ).all()
        states = set(session.scalars(select(ReviewItem.state)))
    assert [(row[1], row[2]) for row in counted] == [(2, 2)] * 4
    assert states == {"done"}


def test_one_lease_sent_from_many_tabs_stores_one_judgement(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"], overlap=2)
        [ada] = people(session, 1)
        [held] = reviews.lease(session, project.id, ada)

    def submit(_: int) -> None:
        with sessions.begin() as session:
            judge(session, project, ada, held)

    raised = race(6, submit)
    assert len(raised) == 5
    assert all(isinstance(error, Conflict) for error in raised)
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(Annotation)) == 1


def test_somebody_who_judged_or_skipped_an_item_never_gets_it_again(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one", "two"], overlap=2)
        ada, grace = people(session, 2)
        first, second = reviews.lease(session, project.id, ada)
        judge(session, project, ada, first)
        judge(session, project, ada, second, verdict="skip")
    with sessions.begin() as session:
        assert reviews.lease(session, project.id, ada) == []
        assert len(reviews.lease(session, project.id, grace)) == 2


def test_undo_appends_the_inverse_and_reopens_the_item_for_its_author(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
        [ada] = people(session, 1)
        [held] = reviews.lease(session, project.id, ada)
        stored = judge(session, project, ada, held)
        assert session.get_one(ReviewItem, held.id).state == "done"
    for _ in range(2):  # undoing twice changes nothing more
        with sessions.begin() as session:
            item = reviews.undo(session, project.id, ada, stored.id)
            assert (item.state, item.lease_user_id) == ("open", ada)
    with sessions.begin() as session:
        verdicts = session.execute(select(Annotation.verdict, Annotation.supersedes).order_by(Annotation.id)).all()
        assert [tuple(row) for row in verdicts] == [("accept", None), ("undo", stored.id)]
        assert reviews.standing_annotations(session, held.id) == []
        [again] = reviews.lease(session, project.id, ada)
        judge(session, project, ada, again, verdict="reject")
        assert session.get_one(ReviewItem, held.id).state == "done"


def test_undo_leaves_the_lease_of_somebody_else_alone(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"], overlap=2)
        ada, grace = people(session, 2)
        stored = judge(session, project, ada, reviews.lease(session, project.id, ada)[0])
        [held] = reviews.lease(session, project.id, grace)
    with sessions.begin() as session:
        assert reviews.undo(session, project.id, ada, stored.id).lease_user_id == grace
        judge(session, project, grace, held)
        assert session.get_one(ReviewItem, held.id).state == "open"  # one of two: Ada's no longer stands


def test_nobody_undoes_the_judgement_of_another(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
        ada, grace = people(session, 2)
        stored = judge(session, project, ada, reviews.lease(session, project.id, ada)[0])
    with sessions.begin() as session, pytest.raises(NotFound):
        reviews.undo(session, project.id, grace, stored.id)


def test_an_escalated_item_leaves_the_queue_until_a_lead_decides(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
        ada, lead = people(session, 2)
        judge(session, project, ada, reviews.lease(session, project.id, ada)[0], verdict="escalate", comment="unsure")
        assert reviews.lease(session, project.id, lead) == []
        [held] = reviews.lease(session, project.id, lead, queue="escalated")
        judge(session, project, lead, held)
        assert session.get_one(ReviewItem, held.id).state == "done"


MEANINGLESS: list[tuple[dict[str, object], str]] = [
    ({"verdict": "praise"}, "unknown verdict"),
    ({"verdict": "undo"}, "unknown verdict"),
    ({"verdict": "correct"}, "cannot be empty"),
    ({"verdict": "correct", "correction": "  \n"}, "cannot be empty"),
    ({"verdict": "correct", "correction": "one"}, "equals the response"),
    ({"verdict": "accept", "correction": "two"}, "takes no correction"),
    ({"verdict": "accept", "tags": ["unheard of"]}, "no tag unheard of"),
    ({"verdict": "correct", "correction": "a\x00b"}, "cannot be stored"),
    ({"verdict": "correct", "correction": "\ud83d"}, "cannot be stored"),
    ({"verdict": "correct", "correction": "x" * 100_001}, "end at"),
    ({"verdict": "accept", "active_ms": -1}, "active_ms"),
]


def test_a_judgement_that_says_nothing_or_cannot_be_kept_is_refused(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
        [ada] = people(session, 1)
        [held] = reviews.lease(session, project.id, ada)
    for values, sentence in MEANINGLESS:
        with sessions.begin() as session, pytest.raises(Unprocessable, match=sentence):
            judge(session, project, ada, held, **values)
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(Annotation)) == 0


UNKEPT_SPANS: list[tuple[dict[str, object], str]] = [
    ({"start": 0, "end": 3}, "a span is"),
    ({"start": 0, "end": 3, "quote": "one", "label": "x"}, "a span is"),
    ({"start": 2, "end": 2, "quote": ""}, "ends behind its start"),
    ({"start": -1, "end": 2, "quote": "on"}, "starts at 0"),
    ({"start": True, "end": 3, "quote": "ne"}, "starts at 0"),
    ({"start": 0, "end": 3, "quote": None}, "are text"),
    ({"start": 0, "end": 3, "quote": "two"}, "does not quote"),
    ({"start": 0, "end": 9, "quote": "one"}, "does not quote"),
    ({"start": 0, "end": 1, "quote": "\ud83d"}, "storable"),
    ({"start": 0, "end": 3, "quote": "one", "tag": "unheard of"}, "no tag unheard of"),
]


def test_a_span_is_kept_only_when_it_quotes_the_response(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["o\U0001f600ne"])
        [ada] = people(session, 1)
        [held] = reviews.lease(session, project.id, ada)
    for span, sentence in UNKEPT_SPANS:
        with sessions.begin() as session, pytest.raises(Unprocessable, match=sentence):
            judge(session, project, ada, held, spans=[span])
    good = [{"start": 1, "end": 3, "quote": "\U0001f600n", "tag": seed.TAGS[0]}]  # characters, not UTF-16 units
    with sessions.begin() as session:
        assert judge(session, project, ada, held, spans=good).spans == good


def test_what_others_hold_does_not_wait_for_anybody_else(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one", "two", "three"])
        ada, grace = (seed.person(session, f"{name}@example.org", "reviewer").user.id for name in ("ada", "grace"))
        reviews.lease(session, project.id, ada, 2, chance=lambda: 1.0)
        assert reviews.progress(session, project.id, ada).waiting == 3
        assert reviews.progress(session, project.id, grace).waiting == 1
