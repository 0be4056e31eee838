"""A queue with a history: windows sampled into strata, some of them reviewed."""

import random
import uuid
from datetime import UTC, datetime, timedelta

from sqlalchemy import insert
from sqlalchemy.orm import Session

from services.store.base import uuid7
from services.store.models import Annotation, Project, ReviewItem, UserAccount
from services.store.sampling import STAMP
from tests.console import seed

# Size of each stratum of a window, items queued of it, and the share of its answers that is wrong.
STRATA = {
    "negative_feedback": (40, 12, 0.7), "schema_failure": (15, 5, 0.6), "low_confidence": (60, 7, 0.25),
    "novelty": (30, 4, 0.1), "uniform": (400, 12, 0.03),
}  # fmt: skip
BATCH = 5000


def queued(
    session: Session, made: Project, *, windows: int = 40, drained: float = 0.7, hours: float = 8.0, scale: int = 1
) -> list[UserAccount]:
    """Items of `windows` windows of `hours` up to now, a part of them judged by three people; returns the people."""
    dice = random.Random(5)
    people = [seed.person(session, f"{name}@example.org", "reviewer", made.id).user for name in ("ada", "mary", "joan")]
    now = datetime.now(UTC).replace(microsecond=0)
    items: list[dict[str, object]] = []
    judged: list[dict[str, object]] = []
    for index in range(windows):
        end = now - timedelta(hours=hours) * (windows - 1 - index)
        label = f"{(end - timedelta(hours=hours)).strftime(STAMP)}/{end.strftime(STAMP)}"
        for strategy, (size, chosen, wrong) in STRATA.items():
            for place in range(chosen * scale):
                item = _item(made, label, strategy, size * scale, place, end, dice)
                items.append(item)
                if place == 0 or dice.random() < drained:
                    done = min(now, end + timedelta(minutes=dice.uniform(5, 600)))
                    item |= {"state": "done", "done_at": done}
                    judged.append(_judgement(item, dice.choice(people), done, dice.random() < wrong, dice))
    for rows, table in ((items, ReviewItem), (judged, Annotation)):
        for start in range(0, len(rows), BATCH):
            session.execute(insert(table), rows[start : start + BATCH])
    return people


def _item(
    made: Project, window: str, strategy: str, size: int, place: int, at: datetime, dice: random.Random
) -> dict[str, object]:
    held_out = dice.random() < 0.2
    identity = uuid7(at.timestamp())
    return {
        "id": identity, "project_id": made.id, "interaction_id": uuid.uuid4(), "strategy": strategy, "window": window,
        "stratum_size": size, "probability": None, "priority": place, "order_hash": identity.hex,
        "split": "held_out" if held_out else "train", "group_key": identity.hex, "overlap_target": 2 if held_out else 1,
        "state": "open", "created_at": at, "done_at": None,
    }  # fmt: skip


def _judgement(
    item: dict[str, object], author: UserAccount, at: datetime, wrong: bool, dice: random.Random
) -> dict[str, object]:
    return {
        "id": uuid7(at.timestamp()), "project_id": item["project_id"], "review_item_id": item["id"],
        "interaction_id": item["interaction_id"], "author_id": author.id, "idempotency_key": uuid.uuid4().hex,
        "verdict": "reject" if wrong else "accept", "tags": [], "spans": [], "assisted": False,
        "active_ms": dice.randint(3000, 30_000), "created_at": at,
    }  # fmt: skip
