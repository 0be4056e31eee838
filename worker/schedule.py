"""Work nobody asks for: sampling when a window closes, the heartbeat job, housekeeping of the ledger."""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import jobs
from services.store.models import Job, Project

DEFAULT_WINDOW_SECONDS = 3600
LONGEST_GRACE_SECONDS = 60
# The shipper is at most this far behind the gateway in ordinary times.
SETTLE_SECONDS = 5.0
HEARTBEAT_QUEUES = ("cpu",)
ROUTINE_KINDS = ("heartbeat", "review.sample")
ROUTINE_KEPT = timedelta(hours=24)

log = structlog.get_logger()


class Window(NamedTuple):
    """A project's sampling window that has closed, by its end."""

    project_id: UUID
    closed_at: datetime


class Sampler:
    """Enqueues `review.sample` once for each closed window. Forgets nothing that matters when it is restarted."""

    def __init__(self) -> None:
        self._done: dict[UUID, datetime] = {}

    def step(self, session: Session, now: datetime) -> list[UUID]:
        """Enqueue what is due; returns the projects. The ledger is only asked when a window has closed."""
        due = [window for window in _closed_windows(session, now) if self._is_new(window)]
        asked = [window.project_id for window in due if not _was_sampled(session, window) and _enqueue(session, window)]
        self._done.update(due)
        return asked

    def _is_new(self, window: Window) -> bool:
        return self._done.get(window.project_id) != window.closed_at


def heartbeat(session: Session) -> None:
    """One heartbeat job a queue; if the last one is unfinished and nothing runs there, nobody serves the queue."""
    for queue in HEARTBEAT_QUEUES:
        try:
            jobs.enqueue(session, "heartbeat", {}, queue=queue, dedupe_key=f"heartbeat:{queue}", priority=100)
        except Conflict:
            _report_unanswered(session, queue)


def _report_unanswered(session: Session, queue: str) -> None:
    busy = session.scalar(select(func.count()).where(Job.queue == queue, Job.state == "running"))
    if busy:
        log.info("the heartbeat job waits: all hands are busy", queue=queue, running=busy)
    else:
        log.error("the last heartbeat job is unfinished: no worker answers", alarm=True, queue=queue)


def prune(session: Session) -> int:
    """Routine jobs are many and say nothing after a day."""
    return jobs.prune(session, ROUTINE_KINDS, older_than=ROUTINE_KEPT)


def _closed_windows(session: Session, now: datetime) -> list[Window]:
    settled = now.timestamp() - SETTLE_SECONDS
    windows = []
    for project in session.execute(select(Project.id, Project.config)):
        seconds = max(1, int(project.config.get("window_seconds", DEFAULT_WINDOW_SECONDS)))
        # The sampler's own rule: before this grace has passed it would find the window still open.
        grace = int(project.config.get("window_grace_seconds", min(seconds, LONGEST_GRACE_SECONDS)))
        closed = (settled - grace) // seconds * seconds
        windows.append(Window(project.id, datetime.fromtimestamp(closed, UTC)))
    return windows


def _was_sampled(session: Session, window: Window) -> bool:
    since = exists().where(
        Job.kind == "review.sample", Job.project_id == window.project_id, Job.created_at >= window.closed_at
    )
    return bool(session.scalar(select(since)))


def _enqueue(session: Session, window: Window) -> bool:
    project = str(window.project_id)
    try:
        jobs.enqueue(
            session,
            "review.sample",
            {"project_id": project},
            project_id=window.project_id,
            dedupe_key=f"review.sample:{project}",
        )
    except Conflict:
        log.info("sampling of the last window is still going on", project=project)
        return False
    return True
