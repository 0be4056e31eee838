"""The shipper process: gateways' log spools into Postgres, at least once read, exactly once stored.

`python -m services.gateway.log_shipper`. It lands a batch, commits, remembers its place, then lets segments go; killed
anywhere in between it repeats what landing already ignores. While Postgres is away it waits, and the spool grows.
"""

import fcntl
import json
import os
import signal
import threading
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from services.app import configure_logs
from services.gateway.log_spool import QUARANTINE
from services.gateway.spool_cleaner import Cleaner
from services.gateway.spool_format import to_row
from services.gateway.spool_tail import Damage, Ended, Tail
from services.settings import Settings
from services.store import erasure_cover, interactions, keys, partitions, pins
from services.store.base import Sessions, make_sessions, uuid7_time
from services.store.failpoints import reach

BATCH_BYTES = 1 << 20
IDLE_SECONDS = 0.05
RETRY_SECONDS = 0.5
TOUCH_EVERY = timedelta(minutes=1)
NEVER = datetime.min.replace(tzinfo=UTC)
DAYS_AHEAD = 7
LOCK_NAME = "shipper.lock"
REPORT_NAME = "shipper.json"

log = structlog.get_logger()


class Shipper:
    """Ships everything below one spool directory. One at a time: `hold_lock` sees to it."""

    def __init__(self, sessions: Sessions, spool: Path) -> None:
        self.landed = 0
        self.quarantined = 0
        self.damage = Damage()
        self._sessions = sessions
        self._spool = spool
        self._tails: dict[str, Tail] = {}
        self._covered: tuple[date, date] | None = None
        self._touched: dict[UUID, datetime] = {}
        self._cleaner = Cleaner(sessions, spool)

    def step(self) -> bool:
        """Ship what there is, one batch of each gateway at most. Returns whether there was any.

        Raises SQLAlchemyError or psycopg.Error while Postgres is away; nothing is forgotten then.
        """
        found = sorted(path.name for path in self._spool.iterdir() if _is_tail(path))
        for name in found:
            self._tails.setdefault(name, Tail(self._spool / name))
        moved = [self._ship(self._tails[name]) for name in found]
        self._cleaner.step(self._tails)
        return any(moved)

    def report(self) -> dict[str, int]:
        """Counts since the start: interactions landed, rows set aside, damage met."""
        return {"landed": self.landed, "quarantined": self.quarantined, **vars(self.damage)}

    def _ship(self, tail: Tail) -> bool:
        ended = tail.read(BATCH_BYTES)
        self._take_account(tail)
        if ended:
            self._land_all(ended)
            reach("shipper.landed")
        if ended or tail.drained:
            tail.keep_place()
        if tail.drained:
            tail.remove()
            del self._tails[tail.directory.name]
        return bool(ended)

    def _land_all(self, ended: Sequence[Ended]) -> None:
        rows = []
        for one in ended:
            if one.admitted.id.version == 7:
                rows.append(to_row(one.admitted, one.final))
            else:
                self._quarantine(one, "the id is not a UUIDv7")
        if rows:
            self._land(rows)

    def _land(self, rows: list[dict[str, Any]]) -> None:
        """All rows, or all but the poisonous: halves of a failing batch are tried until the bad row stands alone."""
        try:
            with self._sessions.begin() as session:
                self._ensure_partitions(session, rows)
                connection: psycopg.Connection[Any] = session.connection().connection.driver_connection  # type: ignore[assignment]
                landing = erasure_cover.drop_covered(session, rows)
                pins.count_hits(session, landing)
                fresh = interactions.land(connection, landing)
                self._touch_keys(session, rows)
                reach("shipper.before_commit")
            self.landed += fresh
        except Exception as error:
            if not is_poison(error):
                # What was about to be committed about partitions is unknown now.
                self._covered = None
                raise
            if len(rows) == 1:
                self._quarantine(rows[0], in_brief(error))
                return
            middle = len(rows) // 2
            self._land(rows[:middle])
            self._land(rows[middle:])

    def _ensure_partitions(self, session: Session, rows: Sequence[dict[str, Any]]) -> None:
        """Only when due: a day that no ensured partition covers, or the days ahead running short."""
        days = [uuid7_time(row["id"]).date() for row in rows]
        today = datetime.now(UTC).date()
        if self._covered and self._covered[0] <= min(days) and self._covered[1] >= today + timedelta(days=DAYS_AHEAD):
            return
        first = datetime.combine(min(days), datetime.min.time(), UTC)
        made = partitions.ensure(session, DAYS_AHEAD, since=first)
        self._covered = (min(days), today + timedelta(days=DAYS_AHEAD))
        if made:
            log.info("partitions_made", names=made)

    def _touch_keys(self, session: Session, rows: Sequence[dict[str, Any]]) -> None:
        """Say when keys were last used, once a minute each: every write wakes the gateways' snapshots."""
        due: dict[UUID, datetime] = {}
        for row in rows:
            key_id, at = row["api_key_id"], row["started_at"]
            if key_id and at > self._touched.get(key_id, NEVER) + TOUCH_EVERY:
                due[key_id] = max(at, due.get(key_id, at))
        if due:
            keys.touch(session, due)
            self._touched |= due

    def _take_account(self, tail: Tail) -> None:
        self.damage.add(tail.damage)
        tail.damage = Damage()
        for orphan in tail.orphans:
            self._quarantine(orphan, "the record of its beginning is lost")
        tail.orphans.clear()

    def _quarantine(self, row: object, reason: str) -> None:
        """Keep what Postgres will not have, on disk before its place in the spool is given up."""
        path = self._spool / QUARANTINE / "rows.jsonl"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with path.open("ab") as file:
            file.write(msgspec.json.encode({"reason": reason, "row": row}) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.quarantined += 1
        log.error("log_row_quarantined", reason=reason, kept=str(path))


def is_poison(error: Exception) -> bool:
    """Whether a row is to blame: bad values, broken constraints, or more than Postgres can hold (class 54)."""
    if isinstance(error, psycopg.DataError | psycopg.IntegrityError | ValueError | TypeError):
        return True
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith("54")


def in_brief(error: Exception) -> str:
    """What is wrong, without the detail in which Postgres quotes the row: reasons are logged, and logs stay."""
    said = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return f"{type(error).__name__}: {said or str(error).splitlines()[0] if str(error) else 'no reason given'}"


def _is_tail(path: Path) -> bool:
    """Directories being born start with a dot; the quarantine is no gateway's."""
    return path.is_dir() and path.name != QUARANTINE and not path.name.startswith(".")


def hold_lock(spool: Path, stopping: threading.Event) -> int | None:
    """Wait to be the only shipper of this spool. Returns the lock's descriptor; None when told to stop first."""
    spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(spool / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    while not stopping.is_set():
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            stopping.wait(RETRY_SECONDS)
    os.close(descriptor)
    return None


def run(shipper: Shipper, spool: Path, stopping: threading.Event) -> None:
    """Ship until told to stop, through every outage."""
    away = False
    reported: dict[str, int] = {}
    while not stopping.is_set():
        try:
            moved = shipper.step()
            away = False
        except (SQLAlchemyError, psycopg.Error) as error:
            if not away:
                log.warning("database_away", error=str(error))
            away = True
            stopping.wait(RETRY_SECONDS)
            continue
        if not moved:
            if shipper.report() != reported:
                reported = shipper.report()
                _write_report(spool / REPORT_NAME, reported)
            stopping.wait(IDLE_SECONDS)


def _write_report(path: Path, report: dict[str, int]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(report))
    draft.rename(path)


def main() -> None:
    """Ship until SIGTERM or SIGINT; what is left waits for the next start."""
    settings = Settings()
    configure_logs(settings.log_level)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    lock = hold_lock(settings.spool, stopping)
    if lock is None:
        return
    shipper = Shipper(make_sessions(settings.database_dsn), settings.spool)
    log.info("shipper_started", spool=str(settings.spool))
    run(shipper, settings.spool, stopping)
    log.info("shipper_stopped", **shipper.report())
    os.close(lock)


if __name__ == "__main__":
    main()
