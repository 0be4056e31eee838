"""A claimed job: its fence, its heartbeat, and how it ends."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self
from uuid import UUID

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from services.store.base import Sessions
from services.store.models import Job

LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 15.0
LONGEST_BACK_OFF_SECONDS = 60.0
LOG_TAIL_CHARACTERS = 8000
# A job that waits comes back after 2, 4, 8 … and at last every 300 seconds: an hour in all.
MOST_WAITS = 18
LONGEST_WAIT_SECONDS = 300.0

log = structlog.get_logger()


class LostLease(RuntimeError):
    """Somebody else holds this job now, or it has ended: stop working, write nothing."""


class JobFailed(RuntimeError):
    """Raised by a handler for a failure that a retry cannot mend; its message is the job's and the run's error."""


class JobWaits(RuntimeError):
    """Raised by a handler when what it needs is away or crowded for now, and nothing is wrong with the work: the job
    comes back later, for about an hour, and the attempt does not count."""


class JobCancelled(RuntimeError):
    """Raised by a handler that has seen `Lease.cancelled` and stopped."""


class Lease:
    """The right to work on one job. `lost` is set when that right is known to be gone.

    Only one thread may use `transaction` at a time; `cancelled` and `lost` may be read from any.
    """

    def __init__(self, sessions: Sessions, job: Job, *, lease_seconds: float, heartbeat_seconds: float) -> None:
        self.sessions = sessions
        self.job_id: UUID = job.id
        self.kind = job.kind
        self.payload = job.payload
        self.fence = job.fence
        self.attempt = job.attempts
        self.max_attempts = job.max_attempts
        self.project_id = job.project_id
        self.lost = threading.Event()
        self._lease = timedelta(seconds=lease_seconds)
        self._heartbeat_seconds = heartbeat_seconds
        self._cancelled = job.cancel_requested
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{job.id}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the heartbeat. A job that was not ended goes back to the queue when its lease runs out."""
        self._closed.set()
        self._thread.join()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction of effects, committed on leaving. It locks the job row, so keep it short.

        Raises LostLease unless the job is still running under this fence.
        """
        with self.sessions.begin() as session:
            self.hold(session)
            yield session

    def hold(self, session: Session) -> None:
        """Lock the job row in a transaction begun without it, before its last effects; for work that takes long.

        Raises LostLease unless the job is still running under this fence.
        """
        if self._renew(session) is None:
            self.lost.set()
            raise LostLease(f"job {self.job_id} is no longer held under fence {self.fence}")

    def cancelled(self) -> bool:
        """Whether somebody asked this job to stop. While Postgres is away the last known answer stands."""
        try:
            with self.sessions() as session:
                asked = session.scalar(select(Job.cancel_requested).where(Job.id == self.job_id))
        except SQLAlchemyError as error:
            log.warning("cannot read the cancel flag", job_id=str(self.job_id), error=str(error))
        else:
            self._cancelled = bool(asked)
        return self._cancelled

    def succeed(self, session: Session | None = None) -> None:
        """End the job well: in the given transaction of this lease, together with the last effect, or in its own."""
        if session is not None:
            end_job(session, self._job(session), "succeeded")
            return
        with self.transaction() as own:
            end_job(own, self._job(own), "succeeded")

    def cancel(self) -> None:
        """End the job as cancelled."""
        with self.transaction() as session:
            end_job(session, self._job(session), "cancelled", error="cancelled on request")

    def release(self) -> None:
        """Hand the job back unfinished, because this worker stops: the next one may start at once."""
        with self.transaction() as session:
            job = self._job(session)
            job.state, job.lease_expires_at, job.published_at = "queued", None, None
            job.attempts -= 1

    def wait(self, reason: str, log_tail: str = "") -> None:
        """Hand the job back for later: each wait is longer than the last, and after `MOST_WAITS` the job has failed."""
        with self.transaction() as session:
            job = self._job(session)
            waits = int(job.payload.get("waits", 0)) + 1
            if waits > MOST_WAITS and not job.cancel_requested:
                end_job(session, job, "failed", error=f"waited for an hour in vain: {reason}", log_tail=log_tail)
                return
            job.payload = {**job.payload, "waits": waits}
            job.attempts -= 1
            _queue_again(session, job, reason, log_tail, pause=min(2.0**waits, LONGEST_WAIT_SECONDS))

    def fail(self, error: str, log_tail: str = "", *, retry: bool = True) -> None:
        """Record a failed attempt: back to the queue after a pause, or the end when attempts or hope ran out."""
        with self.transaction() as session:
            job = self._job(session)
            if retry:
                retry_or_end(session, job, error=error, log_tail=log_tail)
            else:
                end_job(session, job, "failed", error=error, log_tail=log_tail)

    def ended(self) -> bool:
        """Whether the handler has already ended the job under this fence."""
        with self.sessions() as session:
            row = session.execute(select(Job.state, Job.fence).where(Job.id == self.job_id)).one_or_none()
        return row is not None and row.fence == self.fence and row.state not in ("queued", "running")

    def _job(self, session: Session) -> Job:
        return session.get_one(Job, self.job_id, populate_existing=True)

    def _renew(self, session: Session) -> bool | None:
        """Push the lease's end back. Returns the cancel flag, or None when the lease is not ours any more."""
        return session.scalar(
            update(Job)
            .where(Job.id == self.job_id, Job.fence == self.fence, Job.state == "running")
            # now() would be the moment a transaction began, long ago when it waited for a lock.
            .values(lease_expires_at=func.clock_timestamp() + self._lease)
            .returning(Job.cancel_requested)
        )

    def _beat(self) -> None:
        """While Postgres is away nobody can take the job over, so a missed beat is no reason to stop working."""
        while not self._closed.wait(self._heartbeat_seconds):
            try:
                with self.sessions.begin() as session:
                    asked = self._renew(session)
            except SQLAlchemyError as error:
                log.warning("heartbeat missed", job_id=str(self.job_id), error=str(error))
                continue
            if asked is None:
                self.lost.set()
                return
            self._cancelled = asked


def retry_or_end(session: Session, job: Job, *, error: str, log_tail: str = "") -> None:
    """After a failed attempt: queued again with a growing pause, or dead after the last."""
    if job.attempts >= job.max_attempts and not job.cancel_requested:
        end_job(session, job, "dead", error=error, log_tail=log_tail)
        return
    _queue_again(session, job, error, log_tail, pause=min(2.0**job.attempts, LONGEST_BACK_OFF_SECONDS))


def _queue_again(session: Session, job: Job, error: str, log_tail: str, *, pause: float) -> None:
    """Due in `pause` seconds; somebody who asked it to stop meanwhile is obeyed."""
    if job.cancel_requested:
        end_job(session, job, "cancelled", error=f"cancelled on request: {error}", log_tail=log_tail)
        return
    job.state = "queued"
    job.error = error
    job.log_tail = log_tail[-LOG_TAIL_CHARACTERS:] or job.log_tail
    job.published_at = None
    job.lease_expires_at = None
    session.flush()
    session.execute(update(Job).where(Job.id == job.id).values(not_before=func.now() + timedelta(seconds=pause)))


def end_job(session: Session, job: Job, state: str, *, error: str | None = None, log_tail: str = "") -> None:
    """Put a job into a final state. Its run, if it has one, is ended by `runs.settle`, which locks runs before jobs."""
    job.state = state
    job.error = error
    job.log_tail = log_tail[-LOG_TAIL_CHARACTERS:] or job.log_tail
    job.lease_expires_at = None
    session.flush()
    session.execute(update(Job).where(Job.id == job.id).values(finished_at=func.now()))
