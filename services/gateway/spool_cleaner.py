"""The shipper's part in an erasure: once it has read what was logged before the request, the spool is scrubbed."""

import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import func, select, update

from services.gateway.spool_erasure import Matcher, scrub, scrub_quarantine
from services.gateway.spool_format import Admitted, Position, segment_numbers, segment_path
from services.gateway.spool_tail import Tail
from services.store.base import Sessions
from services.store.erasure import UNFINISHED, Rule, Subject, asked_by
from services.store.models import ErasureRequest, Interaction

LOOK_SECONDS = 0.5
# A request that a gateway stamped before the erasure may reach its spool a moment later.
SETTLE_SECONDS = 1.0

log = structlog.get_logger()


class Cleaner:
    """Scrubs one spool for each open erasure, once. Raises SQLAlchemyError while Postgres is away; call it again."""

    def __init__(self, sessions: Sessions, spool: Path) -> None:
        self._sessions = sessions
        self._spool = spool
        self._next_look = 0.0
        # For each open erasure, how far every spool reached when it was first seen.
        self._marks: dict[UUID, dict[str, Position]] = {}

    def step(self, tails: Mapping[str, Tail]) -> None:
        """Look for open erasures now and then, and scrub for those whose part of the log has been shipped."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        for rule in self._open():
            marks = self._marks.setdefault(rule.id, {name: _end(tail.directory) for name, tail in tails.items()})
            if all(_passed(tails[name], mark, rule) for name, mark in marks.items() if name in tails):
                self._clean(rule, tails)
                del self._marks[rule.id]

    def _open(self) -> list[Rule]:
        waiting = select(ErasureRequest).where(
            ErasureRequest.state.in_(UNFINISHED), ErasureRequest.spool_clean_at.is_(None)
        )
        settled = datetime.now(UTC).timestamp() - SETTLE_SECONDS
        with self._sessions() as session:
            found = session.scalars(waiting).all()
        return [
            Rule(one.id, Subject.of(one), one.created_at, False)
            for one in found
            if one.created_at.timestamp() < settled
        ]

    def _clean(self, rule: Rule, tails: Mapping[str, Tail]) -> None:
        matcher = Matcher(lambda admitted: _covers(rule, admitted), lambda ids: self._logged(rule, ids))
        count = sum(scrub(tail.directory, tail.place, matcher) for tail in tails.values())
        count += scrub_quarantine(self._spool, rule.subject.kind, rule.subject.name, matcher)
        with self._sessions.begin() as session:
            session.execute(
                update(ErasureRequest)
                .where(ErasureRequest.id == rule.id)
                .values(spool_clean_at=func.now(), spool_records=ErasureRequest.spool_records + count)
            )
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
