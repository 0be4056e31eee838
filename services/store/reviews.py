"""The review queue: leases, judgements, undo.

An item is judged by `overlap_target` distinct people, exactly: one lease at a time, one counted judgement a
person, and every change of an item happens under its row lock. Judgements are appended; an undo is a row that
supersedes another.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, aliased

from services.errors import Conflict, InvalidRequest, NotFound, Unprocessable
from services.store import pins, worked
from services.store.base import uuid7
from services.store.models import Annotation, InteractionBody, Project, ReviewItem

LEASE = timedelta(minutes=3)
COUNTED = ("accept", "correct", "reject")
SUBMITTED = (*COUNTED, "skip", "escalate")
TEXT_LIMIT = 100_000
COMMENT_LIMIT = 10_000
SPANS_LIMIT = 20_000
UNDO_PREFIX = "undo:"
QUEUE_COUNTED_TO = 10_000


class LostLease(Conflict):
    """Somebody else holds the item now, or nobody waits for it any more."""

    code = "lost_lease"


class Judgement(NamedTuple):
    """What a reviewer sends. `idempotency_key` makes a repeated submit the same submit."""

    verdict: str
    idempotency_key: str
    correction: str | None = None
    tags: Sequence[str] = ()
    spans: Sequence[dict[str, Any]] = ()
    comment: str | None = None
    active_ms: int | None = None


class Submitted(NamedTuple):
    """The stored annotation; `replayed` when the same key had stored it before."""

    annotation: Annotation
    replayed: bool


# --- which judgements stand -------------------------------------------------------------------------------


def standing() -> ColumnElement[bool]:
    """True for annotations that are no undo and have not been undone."""
    undo = aliased(Annotation)
    undone = select(undo.id).where(undo.supersedes == Annotation.id, undo.verdict == "undo")
    return (Annotation.verdict != "undo") & ~undone.correlate(Annotation).exists()


def standing_annotations(session: Session, item_id: UUID) -> list[Annotation]:
    """The judgements of an item that stand, oldest first."""
    query = select(Annotation).where(Annotation.review_item_id == item_id, standing()).order_by(Annotation.id)
    return list(session.scalars(query))


def _judged_by(user_id: UUID) -> ColumnElement[bool]:
    mine = select(Annotation.id).where(
        Annotation.review_item_id == ReviewItem.id, Annotation.author_id == user_id, standing()
    )
    return mine.correlate(ReviewItem).exists()


# --- leases -----------------------------------------------------------------------------------------------


def lease(
    session: Session, project_id: UUID, user_id: UUID, count: int = 5, *, escalated: bool = False
) -> list[ReviewItem]:
    """Hold up to `count` items for someone, those already held included (and renewed, their token unchanged).

    Items somebody else holds or that this person has judged or skipped are never given. `escalated` leases
    from the escalated items instead of the open ones.
    """
    if not 1 <= count <= 20:
        raise InvalidRequest("count must be between 1 and 20", param="count")
    state = "escalated" if escalated else "open"
    waiting = select(ReviewItem).where(ReviewItem.project_id == project_id, ReviewItem.state == state)
    held = waiting.where(ReviewItem.lease_user_id == user_id, ReviewItem.lease_expires_at > func.now())
    items = _locked(session, held.limit(count))
    if len(items) < count:
        # One clock, Postgres's, so that consoles on machines that disagree never share an item.
        free = waiting.where(
            or_(ReviewItem.lease_expires_at.is_(None), ReviewItem.lease_expires_at <= func.now()),
            ~_judged_by(user_id),
        )
        items += _locked(session, free.limit(count - len(items)))
    expires = _now(session) + LEASE
    for item in items:
        if item.lease_user_id != user_id or item.lease_token is None:
            item.lease_user_id, item.lease_token = user_id, uuid4()
        item.lease_expires_at = expires
    session.flush()
    return items


def _locked(session: Session, query: Select[ReviewItem]) -> list[ReviewItem]:
    ordered = query.order_by(ReviewItem.priority, ReviewItem.order_hash)
    return list(
        session.scalars(ordered.with_for_update(skip_locked=True), execution_options={"populate_existing": True})
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
    item.state = "withdrawn"
    session.flush()


def _lock_item(session: Session, project_id: UUID, item_id: UUID) -> ReviewItem:
    item = session.scalar(
        select(ReviewItem).where(ReviewItem.id == item_id, ReviewItem.project_id == project_id).with_for_update(),
        execution_options={"populate_existing": True},
    )
    if item is None:
        raise NotFound("there is no such review item in this project")
    return item


def _held_item(session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID) -> ReviewItem:
    """The item, locked. An expired lease that nobody has taken since is still held: work is not thrown away."""
    item = _lock_item(session, project_id, item_id)
    if item.state not in ("open", "escalated"):
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
    Unprocessable for a judgement that says nothing (an empty correction, one equal to the response).
    """
    _check_shape(judgement)
    before = _replay(session, item_id, user_id, judgement)
    if before is not None:
        return Submitted(before, replayed=True)
    item = _lock_item(session, project_id, item_id)
    before = _replay(session, item_id, user_id, judgement)  # the same submit may have committed while we waited
    if before is not None:
        return Submitted(before, replayed=True)
    item = _held_item(session, project_id, item_id, user_id, lease_token)
    _check_content(session, item, judgement)
    annotation = _append(session, item, user_id, judgement)
    _clear_lease(item)
    _settle(session, item)
    _take_effect(session, item)
    return Submitted(annotation, replayed=False)


def _check_shape(judgement: Judgement) -> None:
    verdict, correction, comment = judgement.verdict, judgement.correction, judgement.comment
    if verdict not in SUBMITTED:
        raise Unprocessable(f"unknown verdict {verdict!r}: choose one of {', '.join(SUBMITTED)}", param="verdict")
    if not 1 <= len(judgement.idempotency_key) <= 200 or judgement.idempotency_key.startswith(UNDO_PREFIX):
        raise Unprocessable("idempotency_key must be 1 to 200 characters of your own", param="idempotency_key")
    if verdict == "correct" and not (correction and correction.strip()):
        raise Unprocessable("a correction cannot be empty", param="correction")
    if verdict != "correct" and correction is not None:
        raise Unprocessable(f"verdict {verdict!r} takes no correction", param="correction")
    if len(correction or "") > TEXT_LIMIT or len(comment or "") > COMMENT_LIMIT:
        raise Unprocessable(f"corrections end at {TEXT_LIMIT} characters, comments at {COMMENT_LIMIT}")
    texts = [judgement.idempotency_key, correction or "", comment or "", *judgement.tags]
    if any("\x00" in text or not _encodable(text) for text in texts):
        raise Unprocessable("text holds a character that cannot be stored (NUL or half of a surrogate pair)")
    _check_spans(judgement.spans)
    if judgement.active_ms is not None and not 0 <= judgement.active_ms <= 86_400_000:
        raise Unprocessable("active_ms must be between 0 and one day", param="active_ms")


def _check_spans(spans: Sequence[dict[str, Any]]) -> None:
    """Whatever JSON the labelling page sends, as far as Postgres keeps it."""
    try:
        encoded = json.dumps(list(spans), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest("spans hold something that is no plain JSON", param="spans") from error
    if len(encoded) > SPANS_LIMIT:
        raise InvalidRequest(f"spans end at {SPANS_LIMIT} characters of JSON", param="spans")
    pending: list[object] = list(spans)
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, str) and ("\x00" in value or not _encodable(value)):
            raise InvalidRequest("spans hold a character that cannot be stored", param="spans")


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


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


def _check_content(session: Session, item: ReviewItem, judgement: Judgement) -> None:
    project = session.get_one(Project, item.project_id)
    unknown = sorted(set(judgement.tags) - set(project.config.get("tags", [])))
    if unknown:
        raise Unprocessable(f"this project has no tag {', '.join(unknown)}", param="tags")
    if judgement.verdict == "correct":
        body = session.get(InteractionBody, item.interaction_id)
        if body is not None and body.output == judgement.correction:
            raise Unprocessable("the correction equals the response; accept it instead", param="correction")


def _append(session: Session, item: ReviewItem, user_id: UUID, judgement: Judgement) -> Annotation:
    mine = select(Annotation.id).where(
        Annotation.review_item_id == item.id, Annotation.author_id == user_id, standing()
    )
    if session.scalar(mine.limit(1)) is not None:
        raise Conflict("you have judged this item already; undo that judgement first", code="judged_already")
    values = judgement._asdict() | {"tags": list(dict.fromkeys(judgement.tags)), "spans": list(judgement.spans)}
    stored: Annotation | None = session.scalar(
        insert(Annotation)
        .values(
            id=uuid7(), project_id=item.project_id, review_item_id=item.id, interaction_id=item.interaction_id,
            author_id=user_id, assisted=False, **values,
        )
        .on_conflict_do_nothing(index_elements=["author_id", "idempotency_key"])
        .returning(Annotation)
    )  # fmt: skip
    if stored is None:  # another item's submit committed the same key between our look and this insert
        raise Conflict("this idempotency key was used for another judgement", param="idempotency_key")
    return stored


def _settle(session: Session, item: ReviewItem) -> None:
    """Set the item's state from the judgements that stand."""
    session.flush()
    annotations = standing_annotations(session, item.id)
    judges = {annotation.author_id for annotation in annotations if annotation.verdict in COUNTED}
    escalations = [a.created_at for a in annotations if a.verdict == "escalate"]
    settled = [a.created_at for a in annotations if a.verdict in COUNTED]
    if len(judges) >= item.overlap_target:
        item.state, item.done_at = "done", _now(session)
    elif escalations and not any(moment > max(escalations) for moment in settled):
        item.state, item.done_at = "escalated", None
    else:
        item.state, item.done_at = "open", None
    session.flush()


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
    item = _lock_item(session, project_id, annotation.review_item_id)
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
        _settle(session, item)
        _take_effect(session, item)
        _hand_back(session, item, user_id)
    return item


def _hand_back(session: Session, item: ReviewItem, user_id: UUID) -> None:
    now = _now(session)
    taken = item.lease_expires_at is not None and item.lease_expires_at > now and item.lease_user_id != user_id
    if item.state in ("open", "escalated") and not taken:
        item.lease_user_id, item.lease_token, item.lease_expires_at = user_id, uuid4(), now + LEASE
        session.flush()


# --- figures of the queue ---------------------------------------------------------------------------------


class Progress(NamedTuple):
    """The bottom line of the review page. `median_seconds` is this person's, over their last 200 judgements.

    `waiting` counts up to QUEUE_COUNTED_TO; `capped` says that it got there.
    """

    waiting: int
    capped: bool
    escalated: int
    done_today: int
    median_seconds: float | None


def progress(session: Session, project_id: UUID, user_id: UUID) -> Progress:
    """How much waits for this person and how fast they went."""
    queue = select(ReviewItem.id).where(ReviewItem.project_id == project_id)
    waiting = queue.where(ReviewItem.state == "open", ~_judged_by(user_id)).limit(QUEUE_COUNTED_TO).subquery()
    escalated = queue.where(ReviewItem.state == "escalated").subquery()
    mine = select(Annotation).where(
        Annotation.project_id == project_id, Annotation.author_id == user_id,
        Annotation.verdict.in_(COUNTED), standing(),
    )  # fmt: skip
    today = mine.where(Annotation.created_at >= func.date_trunc("day", func.now())).subquery()
    recent = mine.where(Annotation.active_ms.is_not(None)).order_by(Annotation.created_at.desc()).limit(200).subquery()
    median = session.scalar(select(func.percentile_cont(0.5).within_group(recent.c.active_ms)))
    count = session.scalar(select(func.count()).select_from(waiting)) or 0
    return Progress(
        waiting=count,
        capped=count >= QUEUE_COUNTED_TO,
        escalated=session.scalar(select(func.count()).select_from(escalated)) or 0,
        done_today=session.scalar(select(func.count()).select_from(today)) or 0,
        median_seconds=None if median is None else float(median) / 1000,
    )
