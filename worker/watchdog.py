"""Notices a worker that has gone deaf: connected to Redis by its own account, yet taking no messages.

Celery workers do this after some Redis restarts (celery#8030, #10302). The ledger shows it: the bell was rung for a
job long ago, this worker has a free hand, and the job still waits. Then the process ends, and whoever supervises it
starts a fresh one. The dispatcher's heartbeat job sees to it that there is a job to notice within a minute.
"""

import os
import signal
import socket
import threading
import time
from uuid import UUID

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from services.store import jobs
from services.store.base import make_sessions
from services.store.models import Job

OVERDUE_SECONDS = 60.0
LOOK_SECONDS = 10.0
LOOKS = 3
GRACE_SECONDS = 20.0

log = structlog.get_logger()


class Watchdog(threading.Thread):
    """Looks at the ledger every few seconds; `LOOKS` sights in a row of the same waiting job end the process."""

    def __init__(self, dsn: str, queue: str, concurrency: int, *, overdue_seconds: float = OVERDUE_SECONDS) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._dsn = dsn
        self._queue = queue
        self._concurrency = concurrency
        self._overdue_seconds = overdue_seconds
        self._waiting: set[UUID] = set()
        self._looks = 0

    def run(self) -> None:
        sessions = make_sessions(self._dsn, pool_size=1)
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                with sessions() as session:
                    deaf = self.look(session)
            except SQLAlchemyError as error:
                log.warning("the watchdog cannot read the ledger", error=str(error))
                continue
            if deaf:
                log.error("this worker has gone deaf and ends itself", alarm=True, queue=self._queue)
                _end()

    def look(self, session: Session) -> bool:
        """One look at the ledger; True when the worker counts as deaf."""
        overdue = set(jobs.overdue(session, self._queue, self._overdue_seconds))
        if _busy(session, self._queue) >= self._concurrency:
            overdue = set()
        self._waiting = overdue & self._waiting if self._looks else overdue
        self._looks = self._looks + 1 if self._waiting else 0
        return self._looks >= LOOKS


def _busy(session: Session, queue: str) -> int:
    """Jobs that workers of this machine are at."""
    ours = Job.worker.startswith(f"{socket.gethostname()}:")
    running = select(func.count()).where(Job.queue == queue, Job.state == "running", ours)
    return session.scalar(running) or 0


def _end() -> None:
    """Ask politely; a main thread that is stuck never hears it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
