"""`python -m tests.erasure.attempt JOB_ID`: one attempt at an erasure, to be killed at a failpoint."""

import sys
from uuid import UUID

from services.settings import Settings
from services.store import jobs
from services.store.base import make_sessions
from worker.erasure.job import erase_job

if __name__ == "__main__":
    settings = Settings()
    lease = jobs.claim(make_sessions(settings.database_dsn), UUID(sys.argv[1]), "killed")
    assert lease is not None
    erase_job(lease, settings)
