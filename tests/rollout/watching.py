"""`python -m tests.rollout.watching`: one look of the watch over canaries, to be killed at a failpoint."""

from datetime import UTC, datetime

from services.settings import Settings
from services.store.base import make_sessions
from tests.rollout.trials import AT_ONCE
from worker.rollout.trial import Trials

if __name__ == "__main__":
    Trials(lands_within=AT_ONCE, quiet=AT_ONCE).step(make_sessions(Settings().database_dsn), datetime.now(UTC))
