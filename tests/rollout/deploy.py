"""`python -m tests.rollout.deploy JOB_ID`: one attempt at a deploy job, to be killed at a failpoint."""

import sys
from uuid import UUID

from services.settings import Settings
from services.store import jobs
from services.store.base import make_sessions
from worker.tasks import HANDLERS

if __name__ == "__main__":
    settings = Settings()
    lease = jobs.claim(make_sessions(settings.database_dsn), UUID(sys.argv[1]), "killed")
    assert lease is not None
    HANDLERS[lease.kind](lease, settings)
