"""Whether the answers that apps received are in Postgres, each by its own id."""

import time
from collections.abc import Collection
from uuid import UUID

from sqlalchemy import select

from services.store.base import Sessions
from services.store.models import Interaction

SECONDS = 60.0


def missing(sessions: Sessions, ids: Collection[str], *, seconds: float = SECONDS) -> list[str]:
    """Which of the answers' ids (`chatcmpl-…`) are not in the log after the shipper had `seconds` for them."""
    waiting = {UUID(one.rpartition("chatcmpl-")[2]): one for one in ids}
    deadline = time.monotonic() + seconds
    while True:
        with sessions() as session:
            for found in session.scalars(select(Interaction.id).execution_options(yield_per=10_000)):
                waiting.pop(found, None)
        if not waiting or time.monotonic() > deadline:
            return sorted(waiting.values())
        time.sleep(0.5)
