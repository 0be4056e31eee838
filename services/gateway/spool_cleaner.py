"""The shipper's part in an erasure: once it has read what was logged before the request, its spool is scrubbed."""

import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import select

from services.gateway.spool_erasure import Matcher, scrub, scrub_quarantine
from services.gateway.spool_format import Admitted, Position, segment_numbers, segment_path
from services.gateway.spool_tail import Tail
from services.store import erasure_spools
from services.store.base import Sessions
from services.store.erasure_cover import Rule, asked_by
from services.store.failpoints import reach
from services.store.models import Interaction

LOOK_SECONDS = 0.5
REGISTER_SECONDS = 30.0
# A request that a gateway stamped before the erasure may reach its spool a moment later.
SETTLE = timedelta(seconds=1)

log = structlog.get_logger()


class Cleaner:
    """Scrubs one spool for each open erasure, once. Raises SQLAlchemyError while Postgres is away; call it again."""

    def __init__(self, sessions: Sessions, spool: Path) -> None:
        self._sessions = sessions
        self._spool = spool
        self._spool_id: UUID | None = None
        self._next_look = 0.0
        self._next_registration = 0.0
        # For each open erasure, how far every tail reached when it was first seen.
        self._marks: dict[UUID, dict[str, Position]] = {}

    def step(self, tails: Mapping[str, Tail]) -> None:
        """Look for open erasures now and then, and scrub for those whose part of the log has been shipped."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        spool_id = self._registered(now)
        for rule in self._open(spool_id):
            marks = self._marks.setdefault(rule.id, {name: _end(tail.directory) for name, tail in tails.items()})
            if all(_passed(tails[name], mark, rule) for name, mark in marks.items() if name in tails):
                self._clean(spool_id, rule, tails)
                del self._marks[rule.id]

    def _registered(self, now: float) -> UUID:
        """The spool's id; erasures wait for spools that are known."""
        if self._spool_id is None:
            self._spool_id = erasure_spools.id_of(self._spool)
        if now >= self._next_registration:
            with self._sessions.begin() as session:
                erasure_spools.register(session, self._spool_id, self._spool)
            self._next_registration = now + REGISTER_SECONDS
        return self._spool_id

    def _open(self, spool_id: UUID) -> list[Rule]:
        with self._sessions() as session:
            return erasure_spools.open_for(session, spool_id, SETTLE)

    def _clean(self, spool_id: UUID, rule: Rule, tails: Mapping[str, Tail]) -> None:
        matcher = Matcher(lambda admitted: _covers(rule, admitted), lambda ids: self._logged(rule, ids))
        count = sum(scrub(tail.directory, tail.place, matcher) for tail in tails.values())
        count += scrub_quarantine(self._spool, rule.subject.kind, rule.subject.name, matcher)
        reach("shipper.scrubbed")
        with self._sessions.begin() as session:
            erasure_spools.cleaned(session, rule.id, spool_id, count)
        log.info("spool_scrubbed", erasure=str(rule.id), records=count)

    def _logged(self, rule: Rule, ids: Collection[UUID]) -> set[UUID]:
        """Those that the tables hold as the subject's: they are taken out only after the spool is clean."""
        if not ids:
            return set()
        mine = select(Interaction.id).where(Interaction.id.in_(ids), *asked_by(rule.subject, rule.asked_at))
        with self._sessions() as session:
            return set(session.scalars(mine))


def _covers(rule: Rule, admitted: Admitted) -> bool:
    row: dict[str, Any] = {
        "end_user": admitted.end_user, "session_key": admitted.session_key, "project_id": admitted.project_id,
        "started_at": datetime.fromtimestamp(admitted.started_at, UTC),
    }  # fmt: skip
    return rule.covers(row)


def _passed(tail: Tail, mark: Position, rule: Rule) -> bool:
    """Whether everything up to the mark was shipped and nothing of the subject's is still being answered."""
    return tail.place >= mark and not any(_covers(rule, admitted) for admitted in tail.unended())


def _end(directory: Path) -> Position:
    """Where a spool ends now."""
    numbers = segment_numbers(directory)
    if not numbers:
        return Position(0, 0)
    return Position(numbers[-1], segment_path(directory, numbers[-1]).stat().st_size)
