"""The audit log: append-only, each row's hash covers the row before it, so an edited or removed row shows.

Cutting rows off the end does not show by itself: compare `Verdict.last_hash` with one noted elsewhere.

People stand in it as `user:<id>`. What that id means lives in the account and can be erased there, so the hashed text
names nobody. Text that does (rows of earlier releases, reasons somebody typed) can be redacted: the row keeps its
place, time, action and hash, and a later event of the chain names the row and the hash it had. Such a row proves that
it was there, and when, but no longer what it said.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Text, cast, func, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from services.store.models import AuditEvent, UserAccount

REDACT = "audit.redact"
GENESIS = "0" * 64
CHAIN_LOCK = 0x77686574_61756469  # Any fixed number; this one spells "whetaudi".


class Verdict(NamedTuple):
    """What `verify` found. `broken_id` is the first row that does not follow from the one before it; `redacted` rows
    stand in their place but no longer say what they said."""

    rows: int
    broken_id: int | None
    last_hash: str
    redacted: int = 0

    @property
    def intact(self) -> bool:
        return self.broken_id is None


def record(session: Session, actor: str, action: str, subject: str, detail: dict[str, Any] | None = None) -> AuditEvent:
    """Append one event in the caller's transaction. Writers queue behind each other until commit, so call it last.

    An actor given by their e-mail address is recorded as `user:<id>`.
    """
    actor = _reference(session, actor)
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


def _reference(session: Session, actor: str) -> str:
    if "@" not in actor:
        return actor
    known = session.scalar(select(UserAccount.id).where(UserAccount.email == actor))
    return f"user:{known}" if known else actor


def verify(session: Session) -> Verdict:
    """Walk the whole chain from its first row."""
    vouched = _redactions(session)
    previous, rows, redacted = GENESIS, 0, 0
    columns = (
        select(AuditEvent, cast(AuditEvent.detail, Text).label("detail_text"))
        .order_by(AuditEvent.id)
        .execution_options(yield_per=500)
    )
    for event, detail in session.execute(columns):
        expected = _digest(previous, event.at, event.actor, event.action, event.subject, detail)
        excused = event.hash != expected and event.action != REDACT and vouched.get(event.id) == event.hash
        if event.previous_hash != previous or not (event.hash == expected or excused):
            return Verdict(rows, event.id, previous, redacted)
        previous, rows, redacted = event.hash, rows + 1, redacted + excused
    return Verdict(rows, None, previous, redacted)


def _redactions(session: Session) -> dict[int, str]:
    """Rows that later events say were redacted, with the hash each had. The walk checks those events in their turn."""
    events = session.execute(
        select(AuditEvent.id, AuditEvent.detail).where(AuditEvent.action == REDACT).order_by(AuditEvent.id)
    )
    return {
        int(row): str(hash_)
        for event_id, detail in events
        for row, hash_ in detail.get("rows", {}).items()
        if int(row) < event_id
    }


def redact(session: Session, actor: str, events: Sequence[AuditEvent], scrub: Callable[[Any], Any]) -> int:
    """Take text out of rows, and append the event that vouches for them; how many rows `scrub` changed.

    A redaction itself is never redacted: it holds ids and hashes only.
    """
    changed: dict[str, str] = {}
    for event in events:
        said = {"actor": event.actor, "subject": event.subject, "detail": event.detail}
        if event.action == REDACT or (kept := scrub(said)) == said:
            continue
        event.actor, event.subject, event.detail = kept["actor"], kept["subject"], kept["detail"]
        event.redacted_at = datetime.now(UTC)
        changed[str(event.id)] = event.hash
    if changed:
        session.flush()
        record(session, actor, REDACT, "audit", {"rows": changed})
    return len(changed)


def _as_stored(session: Session, document: dict[str, Any]) -> str:
    """The detail as Postgres will give it back: jsonb has its own order of keys and form of numbers."""
    return session.scalars(select(cast(cast(literal(json.dumps(document), Text), JSONB), Text))).one()


def _digest(previous: str, at: datetime, actor: str, action: str, subject: str, detail: str) -> str:
    fields = [previous, at.astimezone(UTC).isoformat(timespec="microseconds"), actor, action, subject, detail]
    return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode()).hexdigest()
