"""The review queue: leases, judgements, undo, adjudication.

An item is judged by `overlap_target` distinct people, exactly: one lease at a time, one counted judgement a person, and
every change of an item happens under its row lock; a trigger and a CHECK of the database hold forgetful writers to it.
Judgements are appended; an undo is a row that supersedes another. Judges who disagree make the item `disputed`, and a
lead who was none of them decides: what most of them said decides nothing.
"""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import Select, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import gold, pins, worked
from services.store.base import uuid7
from services.store.models import Annotation, Project, ReviewItem
from services.store.reviews_judgement import UNDO_PREFIX, Judgement, check_content, check_shape
from services.store.reviews_progress import QUEUE_COUNTED_TO, Progress, progress
from services.store.reviews_standing import COUNTED, agree, standing, standing_annotations, touched_by, unrevoked

__all__ = [
    "COUNTED", "LEASE", "QUEUES", "QUEUE_COUNTED_TO", "Judgement", "LostLease", "Progress", "Submitted", "heartbeat",
    "lease", "lock_item", "progress", "release", "standing", "standing_annotations", "submit", "undo", "withdraw",
]  # fmt: skip

LEASE = timedelta(minutes=3)
QUEUES = ("open", "escalated", "disputed")


class LostLease(Conflict):
    """Somebody else holds the item now, or nobody waits for it any more."""

    code = "lost_lease"


class Submitted(NamedTuple):
    """The stored annotation; `replayed` when the same key had stored it before."""

    annotation: Annotation
    replayed: bool


# --- leases -----------------------------------------------------------------------------------------------


def lease(
    session: Session,
    project_id: UUID,
    user_id: UUID,
    count: int = 5,
    *,
    queue: str = "open",
    chance: Callable[[], float] = random.random,
) -> list[ReviewItem]:
    """Hold up to `count` items for someone, those already held included (and renewed, their token unchanged).

    Items somebody else holds or that this person has judged or skipped are never given. `queue` is one of QUEUES; the
    open one hides gold items among the others, each new place one with the project's probability by `chance`.
    """
    if not 1 <= count <= 20:
        raise InvalidRequest("count must be between 1 and 20", param="count")
    if queue not in QUEUES:
        raise InvalidRequest(f"unknown queue {queue!r}: choose one of {', '.join(QUEUES)}", param="queue")
    here = select(ReviewItem).where(ReviewItem.project_id == project_id)
    waiting = here.where(ReviewItem.state == queue)
    mine = or_(ReviewItem.state == queue, gold.held(user_id)) if queue == "open" else ReviewItem.state == queue
    held = here.where(mine, ReviewItem.lease_user_id == user_id, ReviewItem.lease_expires_at > func.now())
    items = _locked(session, held.limit(count), wait=True)
    if len(items) < count:
        # One clock, Postgres's, so that consoles on machines that disagree never share an item.
        free = waiting.where(
            or_(ReviewItem.lease_expires_at.is_(None), ReviewItem.lease_expires_at <= func.now()),
            ~touched_by(user_id),
        )
        new = _locked(session, free.limit(count - len(items)))
        items += _with_gold(session, project_id, user_id, new, chance) if queue == "open" else new
    expires = _now(session) + LEASE
    for item in items:
        if item.lease_user_id != user_id or item.lease_token is None:
            item.lease_user_id, item.lease_token = user_id, uuid4()
        item.lease_expires_at = expires
    session.flush()
    return items


def _with_gold(
    session: Session, project_id: UUID, user_id: UUID, new: list[ReviewItem], chance: Callable[[], float]
) -> list[ReviewItem]:
    """The new items with gold ones at some places. An empty queue stays empty: it has an end."""
    share = gold.share(session.get_one(Project, project_id))
    places = [place for place in range(len(new)) if chance() < share]
    if not places:
        return new
    unseen = gold.unseen(project_id, user_id).limit(len(places)).with_for_update(skip_locked=True)
    checks = list(session.scalars(unseen, execution_options={"populate_existing": True}))
    at, rest = dict(zip(places, checks, strict=False)), iter(new)
    return [at.get(place) or next(rest) for place in range(len(new))]


def _locked(session: Session, query: Select[ReviewItem], *, wait: bool = False) -> list[ReviewItem]:
    """In the queue's order, locked. Items of others are passed over while locked, one's own waited for."""
    ordered = query.order_by(ReviewItem.priority, ReviewItem.order_hash)
    return list(
        session.scalars(ordered.with_for_update(skip_locked=not wait), execution_options={"populate_existing": True})
    )


def _now(session: Session) -> datetime:
    moment = session.scalar(select(func.now()))
    return moment if moment is not None else datetime.now(UTC)


def heartbeat(session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID) -> datetime:
    """Renew a lease and return when it expires now. Raises LostLease when it is no longer this person's."""
    item = _held_item(session, project_id, item_id, user_id, lease_token)
    item.lease_expires_at = _now(session) + LEASE
    session.flush()
    return item.lease_expires_at


def release(session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID) -> None:
    """Give an item back unjudged, for whoever comes next."""
    _clear_lease(_held_item(session, project_id, item_id, user_id, lease_token))
    session.flush()


def withdraw(session: Session, item: ReviewItem) -> None:
    """Take an item out of the queue for good, because its text is gone. Its judgements stay."""
    _clear_lease(item)
    if gold.is_check(item):  # settled already; only nobody can be checked by it any more
        item.gold = None
    else:
        item.state = "withdrawn"
    session.flush()


def lock_item(session: Session, project_id: UUID, item_id: UUID) -> ReviewItem:
    """An item of the project under its row lock. Raises NotFound."""
    item = session.scalar(
        select(ReviewItem).where(ReviewItem.id == item_id, ReviewItem.project_id == project_id).with_for_update(),
        execution_options={"populate_existing": True},
    )
    if item is None:
        raise NotFound("there is no such review item in this project")
    return item


def _held_item(session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID) -> ReviewItem:
    """The item, locked. An expired lease that nobody has taken since is still held: work is not thrown away."""
    item = lock_item(session, project_id, item_id)
    if item.state not in QUEUES and not gold.is_check(item):
        raise LostLease(f"this item is {item.state}; nothing more is asked of it")
    if item.lease_user_id != user_id or item.lease_token != lease_token:
        raise LostLease("this item is no longer leased to you; it has gone to another reviewer")
    return item


def _clear_lease(item: ReviewItem) -> None:
    item.lease_user_id = item.lease_token = item.lease_expires_at = None


# --- judgements -------------------------------------------------------------------------------------------


def submit(
    session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID, judgement: Judgement
) -> Submitted:
    """Store a judgement under a lease, once per (author, idempotency key).

    Raises LostLease without the lease, Conflict for a second judgement by one person or a key used elsewhere,
    Unprocessable for a judgement that says nothing (an empty correction, one equal to the response). What is said of a
    disputed item adjudicates it; what is said of a gold item is a hidden check.
    """
    check_shape(judgement)
    before = _replay(session, item_id, user_id, judgement)
    if before is not None:
        return Submitted(before, replayed=True)
    item = lock_item(session, project_id, item_id)
    before = _replay(session, item_id, user_id, judgement)  # the same submit may have committed while we waited
    if before is not None:
        return Submitted(before, replayed=True)
    item = _held_item(session, project_id, item_id, user_id, lease_token)
    check_content(session, item, judgement)
    annotation = _append(session, item, user_id, judgement)
    _clear_lease(item)
    if not annotation.checked:
        _settle(session, item)
        _take_effect(session, item)
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


def _append(session: Session, item: ReviewItem, user_id: UUID, judgement: Judgement) -> Annotation:
    mine = select(Annotation.id).where(
        Annotation.review_item_id == item.id, Annotation.author_id == user_id, unrevoked()
    )
    if session.scalar(mine.limit(1)) is not None:
        raise Conflict("you have judged this item already; undo that judgement first", code="judged_already")
    values = judgement._asdict() | {"tags": list(dict.fromkeys(judgement.tags)), "spans": list(judgement.spans)}
    stored: Annotation | None = session.scalar(
        insert(Annotation)
        .values(
            id=uuid7(), project_id=item.project_id, review_item_id=item.id, interaction_id=item.interaction_id,
            author_id=user_id, assisted=False, checked=gold.is_check(item),
            adjudicates=item.state == "disputed" and judgement.verdict in COUNTED, **values,
        )
        .on_conflict_do_nothing(index_elements=["author_id", "idempotency_key"])
        .returning(Annotation)
    )  # fmt: skip
    if stored is None:  # another item's submit committed the same key between our look and this insert
        raise Conflict("this idempotency key was used for another judgement", param="idempotency_key")
    return stored


def _settle(session: Session, item: ReviewItem) -> None:
    """Set the item's state from the judgements that stand. A gold item that reopens is gold no longer."""
    session.flush()
    session.refresh(item, ["judged"])
    annotations = standing_annotations(session, item.id)
    counted = [one for one in annotations if one.verdict in COUNTED]
    if any(one.adjudicates for one in counted):
        state = "done"
    elif item.judged >= item.overlap_target:
        state = "done" if agree(counted) else "disputed"
    else:
        state = "escalated" if _escalated(annotations) else "open"
    if state != item.state:
        item.done_at = _now(session) if state == "done" else None
    if state != "done":
        item.gold = None
    item.state = state
    session.flush()


def _escalated(annotations: list[Annotation]) -> bool:
    """Whether somebody asked for a lead and nobody has judged since."""
    last = [one for one in annotations if one.verdict in ("escalate", *COUNTED)][-1:]
    return any(one.verdict == "escalate" for one in last)


def _take_effect(session: Session, item: ReviewItem) -> None:
    """What a project allows to change at once, in the judgement's own transaction."""
    pins.follow(session, item, standing_annotations(session, item.id))
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
            _settle(session, item)
            _take_effect(session, item)
        if _was_asked(session, item, annotation):
            _hand_back(session, item, user_id)
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


def _hand_back(session: Session, item: ReviewItem, user_id: UUID) -> None:
    now = _now(session)
    free = item.lease_expires_at is None or item.lease_expires_at <= now or item.lease_user_id == user_id
    if free:
        item.lease_user_id, item.lease_token, item.lease_expires_at = user_id, uuid4(), now + LEASE
        session.flush()
