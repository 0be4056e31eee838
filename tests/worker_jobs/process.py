"""`python -m tests.worker_jobs.process`: the real worker with handlers whose effects are rows of the audit log."""

import os
import time
from pathlib import Path

from services.settings import Settings
from services.store import audit
from services.store.jobs import JobCancelled, JobFailed, Lease
from worker.main import main


def effect(lease: Lease, _settings: Settings) -> None:
    """One effect, in the transaction that ends the job."""
    with lease.transaction() as session:
        audit.record(session, f"attempt {lease.attempt}", "test.effect", str(lease.job_id))
        lease.succeed(session)


def stuck_once(lease: Lease, settings: Settings) -> None:
    """The first attempt says where it runs and hangs; the next one does the work."""
    if lease.attempt == 1:
        Path(lease.payload["pid_file"]).write_text(str(os.getpid()))
        time.sleep(60)
    effect(lease, settings)


def stopped_once(lease: Lease, settings: Settings) -> None:
    """As `stuck_once`, by fence: a job that is handed back does not count an attempt."""
    if lease.fence == 1:
        Path(lease.payload["pid_file"]).write_text(str(os.getpid()))
        time.sleep(60)
    effect(lease, settings)


def until_cancelled(lease: Lease, _settings: Settings) -> None:
    """Works until somebody asks it to stop."""
    while not lease.cancelled():
        time.sleep(0.05)
    raise JobCancelled


def hopeless(_lease: Lease, _settings: Settings) -> None:
    """Fails in a way that no retry mends."""
    raise JobFailed("there is nothing to learn from")


def broken(_lease: Lease, _settings: Settings) -> None:
    """Fails as a bug does."""
    raise ZeroDivisionError("a bug")


if __name__ == "__main__":
    main(
        handlers={
            "effect": effect,
            "stuck_once": stuck_once,
            "stopped_once": stopped_once,
            "until_cancelled": until_cancelled,
            "hopeless": hopeless,
            "broken": broken,
        }
    )
