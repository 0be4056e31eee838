"""The review queue: judgements, undo, adjudication. Leases are in `reviews_leases`.

An item is judged by `overlap_target` distinct people, exactly: one lease at a time, one counted judgement a person, and
every change of an item happens under its row lock; a trigger and a CHECK of the database hold forgetful writers to it.
Judgements are appended; an undo is a row that supersedes another. Judges who disagree make the item `disputed`, and a
lead decides, one who was none of them where there is one: what most of them said decides nothing.
"""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import gold, pins, worked
from services.store.base import uuid7
from services.store.models import Annotation, ReviewItem
from services.store.reviews_deciding import FOR_LEADS, may_decide
from services.store.reviews_judgement import UNDO_PREFIX, Judgement, check_content, check_shape
from services.store.reviews_leases import (
    LEASE,
    QUEUES,
    LostLease,
    check_held,
    clear,
    hand_back,
    heartbeat,
    lease,
    lock_item,
    now,
    release,
    withdraw,
)
from services.store.reviews_progress import QUEUE_COUNTED_TO, Progress, progress
from services.store.reviews_standing import COUNTED, agree, standing, standing_annotations, touched_by

__all__ = [
    "COUNTED", "LEASE", "QUEUES", "QUEUE_COUNTED_TO", "Judgement", "LostLease", "Progress", "Submitted", "heartbeat",
    "lease", "lock_item", "progress", "release", "standing", "standing_annotations", "submit", "undo", "withdraw",
]  # fmt: skip


class Submitted(NamedTuple):
    """The stored annotation; `replayed` when the same key had stored it before."""

    annotation: Annotation
    replayed: bool


def submit(
    session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID, judgement: Judgement
) -> Submitted:
    """Store a judgement under a lease, once per (author, idempotency key).

    Raises LostLease without the lease, Conflict for a second judgement by one person or a key used elsewhere,
    Unprocessable for a judgement that says nothing (an empty correction, one equal to the response). What is said of a
    disputed item adjudicates it; what is said of a gold item is a hidden check. A lead who has spoken of the item
    before decides it only where no other is left, and the annotation says so (`again`).
    """
    check_shape(judgement)
    item = lock_item(session, project_id, item_id)
    before = _replay(session, item_id, user_id, judgement)  # under the lock: the same submit may just have committed
    if before is not None:
        return Submitted(before, replayed=True)
    check_held(item, user_id, lease_token)
    again = _speaks_again(session, item, user_id)
    check_content(session, item, judgement, decides=again or item.state == "disputed")
    annotation = _append(session, item, user_id, judgement, again=again)
    clear(item)
    if not annotation.checked:
        _take_effect(session, item, _settle(session, item))
    session.flush()
    return Submitted(annotation, replayed=False)


def _replay(session: Session, item_id: UUID, user_id: UUID, judgement: Judgement) -> Annotation | None:
    """The annotation this key stored before. Raises Conflict when it meant something else."""
    found = session.scalar(
        select(Annotation).where(
            Annotation.author_id == user_id, Annotation.idempotency_key == judgement.idempotency_key
        )
    )
    if found is not None and (found.review_item_id, found.verdict) != (item_id, judgement.verdict):
        raise Conflict("this idempotency key was used for another judgement", param="idempotency_key")
    return found


def _speaks_again(session: Session, item: ReviewItem, user_id: UUID) -> bool:
    """Whether this person has judged, skipped or escalated the item already. Raises Conflict unless they may go on."""
    mine = select(ReviewItem.id).where(ReviewItem.id == item.id, touched_by(user_id))
    if session.scalar(mine) is None:
        return False
    allowed = item.state in FOR_LEADS and session.scalar(
        select(ReviewItem.id).where(ReviewItem.id == item.id, may_decide(user_id))
    )
    if not allowed:
        raise Conflict("you have judged this item already; undo that judgement first", code="judged_already")
    return True


def _append(session: Session, item: ReviewItem, user_id: UUID, judgement: Judgement, *, again: bool) -> Annotation:
    values = judgement._asdict() | {"tags": list(dict.fromkeys(judgement.tags)), "spans": list(judgement.spans)}
    stored: Annotation | None = session.scalar(
        insert(Annotation)
        .values(
            id=uuid7(), project_id=item.project_id, review_item_id=item.id, interaction_id=item.interaction_id,
            author_id=user_id, assisted=False, checked=gold.is_check(item),
            adjudicates=(again or item.state == "disputed") and judgement.verdict in COUNTED, again=again, **values,
        )
        .on_conflict_do_nothing(index_elements=["author_id", "idempotency_key"])
        .returning(Annotation)
    )  # fmt: skip
    if stored is None:  # another item's submit committed the same key between our look and this insert
        raise Conflict("this idempotency key was used for another judgement", param="idempotency_key")
    return stored


def _settle(session: Session, item: ReviewItem) -> list[Annotation]:
    """Set the item's state from the judgements that stand, and return them. A gold item that reopens is none any more.

    They are counted here as the trigger counts them, who wrote `judged` behind the session's back.
    """
    annotations = standing_annotations(session, item.id)
    session.expire(item, ["judged"])
    counted = [one for one in annotations if one.verdict in COUNTED]
    if any(one.adjudicates for one in counted):
        state = "done"
    elif len(counted) >= item.overlap_target:
        state = "done" if agree(counted) else "disputed"
    else:
        state = "escalated" if _escalated(annotations) else "open"
    if state != item.state:
        item.done_at = now(session) if state == "done" else None
    if state != "done":
        item.gold = None
    item.state = state
    session.flush()
    return annotations


def _escalated(annotations: list[Annotation]) -> bool:
    """Whether somebody asked for a lead and nobody has judged since."""
    last = [one for one in annotations if one.verdict in ("escalate", *COUNTED)][-1:]
    return any(one.verdict == "escalate" for one in last)


def _take_effect(session: Session, item: ReviewItem, judgements: list[Annotation]) -> None:
    """What a project allows to change at once, in the judgement's own transaction."""
    pins.follow(session, item, judgements)
    worked.follow(session, item)


def undo(session: Session, project_id: UUID, user_id: UUID, annotation_id: UUID) -> ReviewItem:
    """Take one's own judgement back by appending its inverse; the item reopens, leased to its author if free.

    Repeating an undo changes nothing more. Raises NotFound for an annotation that is not this person's.
    """
    annotation = session.scalar(
        select(Annotation).where(
            Annotation.id == annotation_id, Annotation.project_id == project_id, Annotation.author_id == user_id
        )
    )
    if annotation is None or annotation.verdict == "undo":
        raise NotFound("there is no such judgement of yours in this project")
    item = lock_item(session, project_id, annotation.review_item_id)
    if item.state == "withdrawn":
        raise Conflict("this item was withdrawn; its judgements can no longer be undone")
    inverse = session.scalar(
        insert(Annotation)
        .values(
            id=uuid7(), project_id=project_id, review_item_id=item.id, interaction_id=item.interaction_id,
            author_id=user_id, idempotency_key=f"{UNDO_PREFIX}{annotation_id}", verdict="undo", tags=[], spans=[],
            assisted=False, supersedes=annotation_id,
        )
        .on_conflict_do_nothing(index_elements=["author_id", "idempotency_key"])
        .returning(Annotation.id)
    )  # fmt: skip
    if inverse is not None:
        if not annotation.checked:
            _take_effect(session, item, _settle(session, item))
        if _was_asked(session, item, annotation):
            hand_back(session, item, user_id)
    return item


def _was_asked(session: Session, item: ReviewItem, undone: Annotation) -> bool:
    """Whether the item waits again for the one who undid: nobody gets back through an undo what is now a lead's."""
    if undone.checked:
        return gold.is_check(item)
    if item.state == "escalated":
        asked = [one for one in standing_annotations(session, item.id) if one.verdict == "escalate"]
        when = (undone.created_at, undone.id)
        return undone.verdict in COUNTED and all((one.created_at, one.id) < when for one in asked)
    return item.state == "open" or (item.state == "disputed" and undone.adjudicates)
