"""The job ledger: a row is the truth about background work, Redis merely rings the bell.

A job is enqueued in the transaction of the business change it belongs to, claimed with a new fence number and a
lease, and every effect commits through `Lease.transaction`, which refuses once somebody else holds a newer fence.
"""

from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store.base import Sessions, uuid7
from services.store.leases import (
    HEARTBEAT_SECONDS,
    LEASE_SECONDS,
    JobCancelled,
    JobFailed,
    JobWaits,
    Lease,
    LostLease,
    end_job,
    retry_or_end,
)
from services.store.models import Job

__all__ = [
    "Job", "JobCancelled", "JobFailed", "JobWaits", "Lease", "LostLease", "Publication", "claim", "enqueue", "expire",
    "get", "overdue", "prune", "request_cancel", "take_due", "unpublish",
]  # fmt: skip

UNFINISHED = ("queued", "running")
# Trainings take hours and have their own workers, where the GPU is; whatever else is to be done waits for none of them.
CPU, TRAIN = QUEUES = ("cpu", "train")


class Publication(NamedTuple):
    """A due job whose bell is to be rung on its queue."""

    job_id: UUID
    queue: str


def enqueue(
    session: Session,
    kind: str,
    payload: dict[str, Any],
    *,
    queue: str = CPU,
    project_id: UUID | None = None,
    dedupe_key: str | None = None,
    priority: int = 0,
    not_before: datetime | None = None,
    max_attempts: int = 3,
) -> Job:
    """Add a job that becomes visible when the caller commits. Higher `priority` goes first.

    Raises Conflict when an unfinished job holds `dedupe_key`; the session stays usable.
    """
    values = {
        "id": uuid7(), "kind": kind, "payload": payload, "queue": queue, "project_id": project_id, "state": "queued",
        "dedupe_key": dedupe_key, "priority": priority, "max_attempts": max_attempts, "attempts": 0, "fence": 0,
        "cancel_requested": False, "not_before": func.now() if not_before is None else not_before,
    }  # fmt: skip
    statement = (
        insert(Job)
        .values(**values)
        .on_conflict_do_nothing(index_elements=["dedupe_key"], index_where=text("state IN ('queued', 'running')"))
        .returning(Job)
    )
    job = session.scalars(statement).one_or_none()
    if job is None:
        raise Conflict(f"a job {dedupe_key!r} is already queued or running")
    return job


def get(session: Session, job_id: UUID) -> Job:
    """The job as committed. Raises NotFound."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NotFound(f"no job {job_id}")
    return job


def request_cancel(session: Session, job_id: UUID) -> None:
    """A queued job ends here and now; a running one is asked to stop at its next look. Finished ones stay as they are.

    Raises NotFound.
    """
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None:
        raise NotFound(f"no job {job_id}")
    if job.state in UNFINISHED:
        job.cancel_requested = True
    if job.state == "queued":
        end_job(session, job, "cancelled", error="cancelled before it started")
    session.flush()


def claim(
    sessions: Sessions,
    job_id: UUID,
    worker: str,
    *,
    lease_seconds: float = LEASE_SECONDS,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Lease | None:
    """Take a due job for `worker`, or None when it is taken, finished, cancelled, not yet due or gone.

    The lease is kept alive by a thread until `Lease.close`; use it as a context manager.
    """
    with sessions.begin() as session:
        job = session.scalars(
            select(Job)
            .where(Job.id == job_id, Job.state == "queued", Job.not_before <= func.now())
            .with_for_update(skip_locked=True)
        ).one_or_none()
        if job is None:
            return None
        job.state = "running"
        job.worker = worker
        job.fence += 1
        job.attempts += 1
        session.execute(
            update(Job)
            .where(Job.id == job.id)
            .values(started_at=func.now(), lease_expires_at=func.now() + timedelta(seconds=lease_seconds))
        )
        session.flush()
    return Lease(sessions, job, lease_seconds=lease_seconds, heartbeat_seconds=heartbeat_seconds)


def expire(session: Session) -> list[UUID]:
    """End the leases that ran out: their jobs go back to the queue, or to dead after the last attempt."""
    lapsed = session.scalars(
        select(Job)
        .where(Job.state == "running", Job.lease_expires_at < func.now())
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    for job in lapsed:
        retry_or_end(session, job, error=f"worker {job.worker} went silent in attempt {job.attempts}")
    session.flush()
    return [job.id for job in lapsed]


def take_due(session: Session, *, republish_seconds: float, limit: int = 100) -> list[Publication]:
    """Mark as published, and return, the due jobs whose bell was never rung or not answered for `republish_seconds`.

    Marked and committed before ringing: a claim that met this row lock would be skipped and wait for the next ring.
    """
    due = (
        select(Job.id)
        .where(Job.state == "queued", Job.not_before <= func.now(), _unanswered(republish_seconds))
        .order_by(Job.priority.desc(), Job.not_before)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    marked = session.execute(
        update(Job).where(Job.id.in_(due)).values(published_at=func.now()).returning(Job.id, Job.queue, Job.priority)
    ).all()
    return [Publication(row.id, row.queue) for row in sorted(marked, key=lambda row: -row.priority)]


def _unanswered(republish_seconds: float) -> ColumnElement[bool]:
    lapsed = func.now() - timedelta(seconds=republish_seconds)
    return or_(Job.published_at.is_(None), Job.published_at < lapsed)


def unpublish(session: Session, job_ids: list[UUID]) -> None:
    """The bell could not be rung (Redis is away): take the marks back."""
    session.execute(update(Job).where(Job.id.in_(job_ids), Job.state == "queued").values(published_at=None))


def overdue(session: Session, queue: str, seconds: float) -> list[UUID]:
    """Jobs that were rung for, and due for at least `seconds`, yet nobody has claimed."""
    return list(
        session.scalars(
            select(Job.id).where(
                Job.queue == queue,
                Job.state == "queued",
                Job.published_at.is_not(None),
                Job.not_before < func.now() - timedelta(seconds=seconds),
            )
        )
    )


def prune(session: Session, kinds: tuple[str, ...], *, older_than: timedelta) -> int:
    """Delete finished routine jobs of these kinds; returns how many."""
    deleted = session.scalars(
        delete(Job)
        .where(Job.kind.in_(kinds), Job.state.not_in(UNFINISHED), Job.finished_at < func.now() - older_than)
        .returning(Job.id)
    )
    return len(deleted.all())
