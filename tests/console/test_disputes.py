"""Overlap held by the database, disputes that leads decide, hidden gold items, pairs."""

import threading
import uuid

import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from services.errors import Conflict, Unprocessable
from services.store import gold, pages, reviews, reviews_history
from services.store.base import Sessions, uuid7
from services.store.models import Annotation, Project, ReviewItem, UserAccount
from services.store.reviews import Judgement
from tests.console import seed

ALWAYS, NEVER = (lambda: 0.0), (lambda: 1.0)


def people(session: Session, count: int) -> list[uuid.UUID]:
    return [seed.person(session, f"person{n}@example.org", "lead").user.id for n in range(count)]


def say(session: Session, held: ReviewItem, user: uuid.UUID, verdict: str = "accept", **values: object) -> Annotation:
    assert held.lease_token is not None
    sent = Judgement(verdict, str(uuid.uuid4()), **values)  # type: ignore[arg-type]
    return reviews.submit(session, held.project_id, held.id, user, held.lease_token, sent).annotation


def only(session: Session, project: Project, user: uuid.UUID, queue: str = "open") -> ReviewItem:
    [held] = reviews.lease(session, project.id, user, 1, queue=queue, chance=NEVER)
    return held


def dispute(session: Session, project: Project, ada: uuid.UUID, grace: uuid.UUID, split: str = "train") -> ReviewItem:
    item = seed.item(session, seed.interaction(session, project.id, output="one"), overlap=2, split=split)
    say(session, only(session, project, ada), ada)
    say(session, only(session, project, grace), grace, "correct", correction="two")
    return item


def raw(item: ReviewItem, user: uuid.UUID) -> dict[str, object]:
    """A judgement as some other writer might insert it."""
    return {
        "id": uuid7(), "project_id": item.project_id, "review_item_id": item.id, "interaction_id": item.interaction_id,
        "author_id": user, "idempotency_key": str(uuid.uuid4()), "verdict": "accept", "tags": [], "spans": [],
        "assisted": False,
    }  # fmt: skip


# --- overlap ----------------------------------------------------------------------------------------------


def test_writers_who_race_past_the_leases_never_exceed_the_overlap(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        [item] = seed.queue(session, project.id, ["one"], overlap=2)
        everybody = people(session, 6)
    gate = threading.Barrier(6)
    refused: list[Exception] = []

    def write(user: uuid.UUID) -> None:
        gate.wait()
        try:
            with sessions.begin() as session:
                session.execute(insert(Annotation).values(raw(item, user)))
        except IntegrityError as error:
            refused.append(error)

    threads = [threading.Thread(target=write, args=(user,)) for user in everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Annotation)) == 2
        assert session.get_one(ReviewItem, item.id).judged == 2
    assert len(refused) == 4
    assert all("ck_review_item_judged" in str(error) for error in refused)


def test_the_database_lets_nobody_judge_an_item_twice(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        [item] = seed.queue(session, project.id, ["one"], overlap=3)
        [ada] = people(session, 1)
        session.execute(insert(Annotation).values(raw(item, ada)))
    with sessions.begin() as session, pytest.raises(IntegrityError, match="judges an item once"):
        session.execute(insert(Annotation).values(raw(item, ada)))


# --- disputes ---------------------------------------------------------------------------------------------


def test_a_lead_who_was_no_judge_settles_a_dispute_and_nothing_is_overwritten(
    sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        ada, grace, lead = people(session, 3)
        item = dispute(session, project, ada, grace)
        assert item.state == "disputed"
        assert reviews.lease(session, project.id, ada, queue="disputed") == []
        held = only(session, project, lead, "disputed")
        with pytest.raises(Unprocessable, match="why you decide so"):
            say(session, held, lead)
        decision = say(session, held, lead, comment="the first is right")
        assert decision.adjudicates
        assert (item.state, item.judged) == ("done", 2)
        spoken = reviews.standing_annotations(session, item.id)
        assert [(one.verdict, one.adjudicates) for one in spoken] == [
            ("accept", False), ("correct", False), ("accept", True),
        ]  # fmt: skip


def test_taking_a_decision_back_brings_the_dispute_back(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        ada, grace, lead = people(session, 3)
        item = dispute(session, project, ada, grace)
        decision = say(session, only(session, project, lead, "disputed"), lead, comment="so")
        gold.mark(session, item, lead)
        reviews.undo(session, project.id, lead, decision.id)
        assert (item.state, item.lease_user_id, item.gold) == ("disputed", lead, None)


def test_judges_who_come_to_agree_end_their_dispute(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        ada, grace = people(session, 2)
        item = dispute(session, project, ada, grace)
        first = session.scalars(select(Annotation).where(Annotation.author_id == ada)).one()
        assert reviews.undo(session, project.id, ada, first.id).lease_user_id == ada
        say(session, only(session, project, ada), ada, "correct", correction="two  \n")
        assert item.state == "done"


def test_an_undo_never_hands_an_escalated_item_to_somebody_who_is_no_lead(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        ada, grace = people(session, 2)
        [item] = seed.queue(session, project.id, ["one"], overlap=2)
        first = say(session, only(session, project, ada), ada)
    with sessions.begin() as session:
        say(session, only(session, project, grace), grace, "escalate", comment="unsure")
    with sessions.begin() as session:
        undone = reviews.undo(session, project.id, ada, first.id)
        assert (undone.id, undone.state, undone.lease_user_id) == (item.id, "escalated", None)


def test_decisions_are_shown_to_others_unless_they_would_give_something_away(
    sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        ada, grace, lead = people(session, 3)
        for split in ("train", "held_out", "train"):
            item = dispute(session, project, ada, grace, split)
            say(session, only(session, project, lead, "disputed"), lead, comment=f"because it is {split}")
        gold.mark(session, item, lead)
        shown = reviews_history.decided(session, project.id)
    assert [(one.decision.comment, one.body.output) for one in shown] == [("because it is train", "one")]


# --- hidden gold items ------------------------------------------------------------------------------------


def gold_item(session: Session, project: Project) -> tuple[ReviewItem, list[uuid.UUID]]:
    ada, grace, lead, *others = people(session, 6)
    item = dispute(session, project, ada, grace)
    say(session, only(session, project, lead, "disputed"), lead, "correct", correction='{"a": 1}', comment="so")
    gold.mark(session, item, lead)
    return item, others


def test_answers_to_hidden_checks_count_for_nothing_but_accuracy(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        item, others = gold_item(session, project)
        seed.queue(session, project.id, [f"open {n}" for n in range(4)])
        before = pages.judgements(session, project.id)
        verdicts = [("correct", '{ "a":1 }'), ("accept", None), ("skip", None)]
        for other, (verdict, correction) in zip(others, verdicts, strict=True):
            [held] = reviews.lease(session, project.id, other, 1, chance=ALWAYS)
            assert held.id == item.id
            assert say(session, held, other, verdict, correction=correction).checked
        assert pages.judgements(session, project.id) == before
        assert (item.state, item.judged) == ("done", 2)
        assert len(reviews.standing_annotations(session, item.id)) == 3
        told = gold.accuracy(session, project.id)
    assert [(one.name, one.answered, one.right) for one in told] == [("Person3", 1, 1), ("Person4", 1, 0)]
    assert all(0 <= one.low < one.high <= 1 for one in told)


def test_a_check_is_shown_once_never_to_its_judges_and_never_in_an_empty_queue(
    sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        item, (alan, *_) = gold_item(session, project)
        judge = session.scalars(select(Annotation.author_id).where(Annotation.review_item_id == item.id)).first()
        assert judge is not None
        assert reviews.lease(session, project.id, alan, 5, chance=ALWAYS) == []
        seed.queue(session, project.id, ["open one", "open two"])
        assert item.id not in {one.id for one in reviews.lease(session, project.id, judge, 1, chance=ALWAYS)}
        [held] = reviews.lease(session, project.id, alan, 1, chance=ALWAYS)
        assert held.id == item.id
        assert [one.id for one in reviews.lease(session, project.id, alan, 1)] == [item.id]  # renewed, as any other
        stored = say(session, held, alan)
        [after] = reviews.lease(session, project.id, alan, 1, chance=ALWAYS)
        assert after.id != item.id
        assert reviews.undo(session, project.id, alan, stored.id).lease_user_id == alan  # undone as any other
        assert item.state == "done"


def test_only_what_is_certain_becomes_gold(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        ada, grace = people(session, 2)
        disputed = dispute(session, project, ada, grace)
        [single, agreed] = [seed.queue(session, project.id, ["x"], overlap=overlap)[0] for overlap in (1, 2)]
        for user in (ada, grace):
            for held in reviews.lease(session, project.id, user, 5, chance=NEVER):
                say(session, held, user)
        for uncertain in (disputed, single):
            with pytest.raises(Conflict, match="can be gold"):
                gold.mark(session, uncertain, ada)
        gold.mark(session, agreed, ada)
        assert agreed.gold is not None


def test_the_wilson_interval_is_the_published_one() -> None:
    """Wilson 1927, as tabulated for 8 of 10."""
    low, high = gold.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


# --- pairs ------------------------------------------------------------------------------------------------


def test_a_pair_is_compared_and_a_single_response_is_not(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        [ada] = people(session, 1)
        [single] = seed.queue(session, project.id, ["one"])
        logged = seed.interaction(session, project.id, output="served")
        pair = seed.item(session, logged, priority=1, alternative={"output": "other", "digest": None})
        reviews.lease(session, project.id, ada, chance=NEVER)
        for item, verdict, values in (
            (single, "prefer", {"preference": "tie"}), (pair, "accept", {}), (pair, "prefer", {}),
            (pair, "prefer", {"preference": "left"}), (pair, "correct", {"correction": "x"}),
            (pair, "reject", {"preference": "tie"}),
        ):  # fmt: skip
            with pytest.raises(Unprocessable):
                say(session, item, ada, verdict, **values)
        assert say(session, pair, ada, "prefer", preference="alternative").preference == "alternative"
        assert (pair.state, pair.judged) == ("done", 1)


# --- when no other lead is left -----------------------------------------------------------------------------


def led_by(session: Session, project: Project, leads: int) -> list[uuid.UUID]:
    """So many leads, and two reviewers behind them."""
    roles = [("lead", n) for n in range(leads)] + [("reviewer", n) for n in range(2)]
    return [seed.person(session, f"{role}{n}@example.org", role, project.id).user.id for role, n in roles]


def test_the_only_lead_decides_what_they_judged_and_it_is_noted(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        lead, ada, grace = led_by(session, project, 1)
        item = dispute(session, project, lead, ada)
        assert reviews.lease(session, project.id, grace, queue="disputed")[0].id == item.id
        reviews.release(session, project.id, item.id, grace, item.lease_token or uuid.uuid4())
        held = only(session, project, lead, "disputed")
        with pytest.raises(Unprocessable, match="why you decide so"):
            say(session, held, lead)
        with pytest.raises(Unprocessable, match="yours to decide"):
            say(session, held, lead, "escalate", comment="no")
        decision = say(session, held, lead, "correct", correction="three", comment="both of us were wrong")
    with sessions.begin() as session:
        spoken = reviews.standing_annotations(session, item.id)
        assert [(one.verdict, one.adjudicates, one.again) for one in spoken] == [
            ("accept", False, False), ("correct", False, False), ("correct", True, True),
        ]  # fmt: skip
        settled = reviews.lock_item(session, project.id, item.id)
        assert (settled.state, settled.judged) == ("done", 2)
        with pytest.raises(Conflict, match="none of its judges"):
            gold.mark(session, settled, lead)
        assert reviews.undo(session, project.id, lead, decision.id).lease_user_id == lead
        assert settled.state == "disputed"


def test_a_judge_does_not_decide_while_another_lead_is_there_who_was_none(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        lead, other, ada, _ = led_by(session, project, 2)
        item = dispute(session, project, lead, ada)
        assert reviews.lease(session, project.id, lead, queue="disputed") == []
        assert reviews.progress(session, project.id, lead).disputed == 0
        assert reviews.progress(session, project.id, other).disputed == 1
        session.get_one(UserAccount, other).disabled_at = item.created_at
        session.flush()
        assert [one.id for one in reviews.lease(session, project.id, lead, queue="disputed")] == [item.id]
        session.get_one(UserAccount, other).disabled_at = None  # back before the decision is sent
        session.flush()
        with pytest.raises(Conflict, match="judged this item already"):
            say(session, item, lead, comment="so")


def test_two_leads_who_judged_each_other_are_not_stuck(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        first, second, *_ = led_by(session, project, 2)
        item = dispute(session, project, first, second)
        assert say(session, only(session, project, second, "disputed"), second, comment="so").again
        assert item.state == "done"


def test_what_the_only_lead_skips_is_not_put_before_them_again(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        lead, ada, grace = led_by(session, project, 1)
        item = seed.item(session, seed.interaction(session, project.id, output="one"), overlap=2)
        say(session, only(session, project, lead), lead, "skip", comment="needs an expert")
    for user, verdict in ((ada, "accept"), (grace, "reject")):
        with sessions.begin() as session:
            say(session, only(session, project, user), user, verdict)
    with sessions.begin() as session:  # skipped before it was disputed: it is theirs to decide now
        assert say(session, only(session, project, lead, "disputed"), lead, "skip", comment="cannot say").again
    with sessions.begin() as session:
        assert reviews.lease(session, project.id, lead, queue="disputed") == []
        assert session.get_one(ReviewItem, item.id).state == "disputed"


def test_the_only_lead_answers_what_was_escalated_after_they_judged_it(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        lead, ada, _ = led_by(session, project, 1)
        item = seed.item(session, seed.interaction(session, project.id, output="one"), overlap=2)
        say(session, only(session, project, lead), lead)
        say(session, only(session, project, ada), ada, "escalate", comment="is that so?")
        decision = say(session, only(session, project, lead, "escalated"), lead, comment="it is")
        assert (decision.adjudicates, decision.again, item.state, item.judged) == (True, True, "done", 1)


def test_the_database_knows_a_second_voice_only_by_its_mark(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        lead, ada, _ = led_by(session, project, 1)
        item = dispute(session, project, lead, ada)
    marked = raw(item, lead) | {"adjudicates": True, "again": True}
    for values, said in (
        (raw(item, lead) | {"adjudicates": True}, "judges an item once"),
        (raw(item, lead) | {"again": True}, "ck_annotation_again"),
    ):
        with pytest.raises(IntegrityError, match=said), sessions.begin() as session:
            session.execute(insert(Annotation).values(values))
    with sessions.begin() as session:
        session.execute(insert(Annotation).values(marked))
    with pytest.raises(IntegrityError, match="judges an item once"), sessions.begin() as session:
        session.execute(insert(Annotation).values(marked | {"id": uuid7(), "idempotency_key": "another"}))


def test_nobody_speaks_a_third_time(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        lead, ada, _ = led_by(session, project, 1)
        item = dispute(session, project, lead, ada)
        said = session.scalars(select(Annotation.id).where(Annotation.author_id == ada)).one()
    with sessions.begin() as session:
        assert say(session, only(session, project, lead, "disputed"), lead, "skip", comment="cannot say").again
    with sessions.begin() as session:
        reviews.undo(session, project.id, ada, said)
        say(session, only(session, project, ada), ada, "reject")  # disputed anew, after the skip
    with sessions.begin() as session:
        assert session.get_one(ReviewItem, item.id).state == "disputed"
        assert reviews.lease(session, project.id, lead, queue="disputed") == []
