"""Partitions of the log: `interaction` by month, `interaction_body` by day, made ahead of time.

There is no DEFAULT partition (it would block DETACH CONCURRENTLY). A partition is created as a table of its own and
then attached: `CREATE TABLE … PARTITION OF` would lock the parent against readers, ATTACH does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

LOCK = 0x77686574_70617274  # "whetpart": one maker at a time
FURTHEST_BACK_DAYS = 31


@dataclass(frozen=True)
class Partition:
    """One partition: UUIDv7 ids made on days `start` (inclusive) to `end` (exclusive), UTC."""

    parent: str
    name: str
    start: date
    end: date


def bound(day: date) -> UUID:
    """The smallest UUID whose time is that day's first millisecond (UTC), version and variant bits left zero."""
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return UUID(int=int(start.timestamp() * 1000) << 80)


def wanted(first: date, last: date) -> Iterator[Partition]:
    """Every partition that ids of these days (both inclusive) fall into."""
    month = first.replace(day=1)
    while month <= last:
        following = (month + timedelta(days=32)).replace(day=1)
        yield Partition("interaction", f"interaction_{month:%Y_%m}", month, following)
        month = following
    for offset in range((last - first).days + 1):
        day = first + timedelta(days=offset)
        yield Partition("interaction_body", f"interaction_body_{day:%Y_%m_%d}", day, day + timedelta(days=1))


def ensure(session: Session, days_ahead: int = 7, *, since: datetime | None = None) -> list[str]:
    """Make what is missing from `since` (default now, at most 31 days back) to `days_ahead` days from now.

    Idempotent, and safe to call from several processes at once. Returns the names it made.
    """
    today = datetime.now(UTC).date()
    earliest = today - timedelta(days=FURTHEST_BACK_DAYS)
    first = max(min(since.astimezone(UTC).date(), today), earliest) if since else today
    parts = list(wanted(first, today + timedelta(days=days_ahead)))
    if not _missing(session, parts):
        return []
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    made = _missing(session, parts)
    for part in made:
        _make(session, part)
    return [part.name for part in made]


def _missing(session: Session, parts: Sequence[Partition]) -> list[Partition]:
    """Read from pg_class, not by to_regclass: its cache may still say "no" of what another session just made."""
    found = session.scalars(
        text("SELECT relname FROM pg_class WHERE relname = ANY(:names) AND pg_table_is_visible(oid)"),
        {"names": [part.name for part in parts]},
    )
    existing = set(found)
    return [part for part in parts if part.name not in existing]


def _make(session: Session, part: Partition) -> None:
    """Names and bounds are built from dates alone, so they need no quoting beyond their own."""
    session.execute(text(f"CREATE TABLE {part.name} (LIKE {part.parent} INCLUDING ALL)"))
    session.execute(
        text(
            f"ALTER TABLE {part.parent} ATTACH PARTITION {part.name} "
            f"FOR VALUES FROM ('{bound(part.start)}') TO ('{bound(part.end)}')"
        )
    )
