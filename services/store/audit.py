"""The audit log: append-only, each row's hash covers the row before it, so an edited or removed row shows.

Cutting rows off the end does not show by itself: compare `Verdict.last_hash` with one noted elsewhere.
"""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Text, cast, func, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from services.store.models import AuditEvent

GENESIS = "0" * 64
CHAIN_LOCK = 0x77686574_61756469  # Any fixed number; this one spells "whetaudi".


class Verdict(NamedTuple):
    """What `verify` found. `broken_id` is the first row that does not follow from the one before it."""

    rows: int
    broken_id: int | None
    last_hash: str

    @property
    def intact(self) -> bool:
        return self.broken_id is None


def record(session: Session, actor: str, action: str, subject: str, detail: dict[str, Any] | None = None) -> AuditEvent:
    """Append one event in the caller's transaction. Writers queue behind each other until commit, so call it last."""
    session.execute(select(func.pg_advisory_xact_lock(CHAIN_LOCK)))
    previous = session.scalar(select(AuditEvent.hash).order_by(AuditEvent.id.desc()).limit(1)) or GENESIS
    at = datetime.now(UTC)
    document = json.loads(json.dumps(detail or {}, default=str))
    event = AuditEvent(
        at=at,
        actor=actor,
        action=action,
        subject=subject,
        detail=document,
        previous_hash=previous,
        hash=_digest(previous, at, actor, action, subject, _as_stored(session, document)),
    )
    session.add(event)
    session.flush()
    return event


def verify(session: Session) -> Verdict:
    """Walk the whole chain from its first row."""
    previous, rows = GENESIS, 0
    columns = (
        select(AuditEvent, cast(AuditEvent.detail, Text).label("detail_text"))
        .order_by(AuditEvent.id)
        .execution_options(yield_per=500)
    )
    for event, detail in session.execute(columns):
        expected = _digest(previous, event.at, event.actor, event.action, event.subject, detail)
        if event.previous_hash != previous or event.hash != expected:
            return Verdict(rows, event.id, previous)
        previous, rows = event.hash, rows + 1
    return Verdict(rows, None, previous)


def _as_stored(session: Session, document: dict[str, Any]) -> str:
    """The detail as Postgres will give it back: jsonb has its own order of keys and form of numbers."""
    return session.scalars(select(cast(cast(literal(json.dumps(document), Text), JSONB), Text))).one()


def _digest(previous: str, at: datetime, actor: str, action: str, subject: str, detail: str) -> str:
    fields = [previous, at.astimezone(UTC).isoformat(timespec="microseconds"), actor, action, subject, detail]
    return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode()).hexdigest()
