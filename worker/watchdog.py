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

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from services.store import jobs
from services.store.base import make_sessions
from services.store.models import Job

OVERDUE_SECONDS = 60.0
LOOK_SECONDS = 10.0
LOOKS = 3
GRACE_SECONDS = 20.0

log = structlog.get_logger()


class Watchdog(threading.Thread):
    """Looks at the ledger every few seconds; `LOOKS` overdue sights of the same job in a row end the process."""

    def __init__(self, dsn: str, queue: str, concurrency: int, *, overdue_seconds: float = OVERDUE_SECONDS) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._dsn = dsn
        self._queue = queue
        self._concurrency = concurrency
        self._overdue_seconds = overdue_seconds

    def run(self) -> None:
        sessions = make_sessions(self._dsn, pool_size=1)
        seen, looks = set[object](), 0
        while looks < LOOKS:
            time.sleep(LOOK_SECONDS)
            try:
                with sessions() as session:
                    waiting = set[object](jobs.overdue(session, self._queue, self._overdue_seconds))
                    busy = session.scalar(
                        select(func.count()).where(
                            Job.queue == self._queue,
                            Job.state == "running",
                            Job.worker.startswith(f"{socket.gethostname()}:"),
                        )
                    )
            except SQLAlchemyError as error:
                log.warning("the watchdog cannot read the ledger", error=str(error))
                looks = 0
                continue
            seen = waiting & seen if looks else waiting
            looks = looks + 1 if seen and (busy or 0) < self._concurrency else 0
        log.error("this worker has gone deaf and ends itself", alarm=True, queue=self._queue, waiting=len(seen))
        self._end()

    def _end(self) -> None:
        """Ask politely; a main thread that is stuck never hears it."""
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(1)
