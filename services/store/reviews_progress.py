"""Figures of the queue for the person in front of it."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from services.store.models import Annotation, ReviewItem
from services.store.reviews_deciding import FOR_LEADS, may_decide
from services.store.reviews_standing import COUNTED, touched_by, unrevoked

QUEUE_COUNTED_TO = 10_000


class Progress(NamedTuple):
    """The bottom line of the review page. `median_seconds` is this person's, over their last 200 judgements.

    `waiting` leaves out what others hold now; it counts up to QUEUE_COUNTED_TO, and `capped` says that it got there.
    `escalated` and `disputed` are what this person may decide if they lead here.
    """

    waiting: int
    capped: bool
    escalated: int
    disputed: int
    done_today: int
    median_seconds: float | None


def progress(session: Session, project_id: UUID, user_id: UUID) -> Progress:
    """How much waits for this person and how fast they went. Hidden checks count here, or they would show."""
    queue = select(ReviewItem.id).where(ReviewItem.project_id == project_id)
    free = or_(ReviewItem.lease_expires_at.is_(None), ReviewItem.lease_expires_at <= func.now())
    within_reach = or_(free, ReviewItem.lease_user_id == user_id)
    open_ones = queue.where(ReviewItem.state == "open", within_reach, ~touched_by(user_id))
    waiting = open_ones.limit(QUEUE_COUNTED_TO).subquery()
    by_lead = session.execute(
        select(ReviewItem.state, func.count())
        .where(ReviewItem.project_id == project_id, ReviewItem.state.in_(FOR_LEADS), may_decide(user_id))
        .group_by(ReviewItem.state)
    )
    held_up = {str(row[0]): int(row[1]) for row in by_lead}
    mine = select(Annotation).where(
        Annotation.project_id == project_id, Annotation.author_id == user_id,
        Annotation.verdict.in_(COUNTED), unrevoked(),
    )  # fmt: skip
    today = mine.where(Annotation.created_at >= func.date_trunc("day", func.now())).subquery()
    recent = mine.where(Annotation.active_ms.is_not(None)).order_by(Annotation.created_at.desc()).limit(200).subquery()
    median = session.scalar(select(func.percentile_cont(0.5).within_group(recent.c.active_ms)))
    count = session.scalar(select(func.count()).select_from(waiting)) or 0
    return Progress(
        waiting=count,
        capped=count >= QUEUE_COUNTED_TO,
        escalated=held_up.get("escalated", 0),
        disputed=held_up.get("disputed", 0),
        done_today=session.scalar(select(func.count()).select_from(today)) or 0,
        median_seconds=None if median is None else float(median) / 1000,
    )
