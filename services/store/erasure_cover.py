"""What an erasure covers: who is meant, which rows of the log are theirs, and what may not land any more.

It covers what its subject asked before the request, whenever that comes to land; what they ask later is new.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, and_, cast, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import BYTEA
from sqlalchemy.orm import Session

from services.store.examples import ERASED
from services.store.models import ErasureRequest, Example, Feedback, Interaction, Project

HASHED = "sha256:"


class Subject(NamedTuple):
    """Who is erased: `kind` is end_user or session, `name` as apps send it; `project_id` None means everywhere."""

    project_id: UUID | None
    kind: str
    name: str

    @classmethod
    def of(cls, request: ErasureRequest) -> "Subject":
        return cls(request.project_id, request.kind, request.subject)


def hashed(name: str) -> str:
    """What stands in a finished request in place of its subject's name."""
    return HASHED + hashlib.sha256(name.encode()).hexdigest()


def asked_by(subject: Subject, until: Any) -> list[ColumnElement[bool]]:  # noqa: ANN401 - a moment or an expression
    """Conditions on interactions: asked by the subject, before `until`."""
    column = Interaction.end_user if subject.kind == "end_user" else Interaction.session_key
    # Every project by name, where it is all of them: the indexes begin with it. No project is ever deleted.
    here = [subject.project_id] if subject.project_id else select(Project.id)
    return [column == subject.name, Interaction.started_at <= until, Interaction.project_id.in_(here)]


def is_erased(project_id: UUID) -> ColumnElement[bool]:
    """Whether who asked an interaction asked to be erased after it."""
    here = or_(ErasureRequest.project_id == project_id, ErasureRequest.project_id.is_(None))
    subject = or_(
        and_(ErasureRequest.kind == "end_user", _names(Interaction.end_user)),
        and_(ErasureRequest.kind == "session", _names(Interaction.session_key)),
    )
    return select(ErasureRequest.id).where(here, subject, Interaction.started_at <= ErasureRequest.created_at).exists()


def _names(column: Any) -> ColumnElement[bool]:  # noqa: ANN401 - a column
    digest = func.encode(func.sha256(cast(func.convert_to(column, "UTF8"), BYTEA)), "hex")
    return or_(ErasureRequest.subject == column, ErasureRequest.subject == func.concat(HASHED, digest))


class Rule(NamedTuple):
    """One request, for deciding about a record that no table holds yet."""

    id: UUID
    subject: Subject
    asked_at: datetime
    finished: bool

    @classmethod
    def of(cls, request: ErasureRequest) -> "Rule":
        return cls(request.id, Subject.of(request), request.created_at, request.finished_at is not None)

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the log, or what it is about to be, belongs to the subject."""
        name = row.get(self.subject.kind if self.subject.kind == "end_user" else "session_key")
        here = self.subject.project_id in (None, row.get("project_id"))
        named = isinstance(name, str) and self.subject.name in (name, hashed(name))
        return here and named and row["started_at"] <= self.asked_at


def drop_covered(session: Session, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that may land; the others are counted on their request, and what was said of them is deleted.

    A prompt in which an erased correction stood as a worked example lands without its tokens.
    """
    known = _rules_about(session, rows)
    dropped: dict[UUID, Rule] = {}
    for row in rows if known else ():
        rule = next((one for one in known if one.covers(row)), None)
        if rule is not None:
            dropped[row["id"]] = rule
    for rule in set(dropped.values()):
        column = ErasureRequest.late_rows if rule.finished else ErasureRequest.spool_records
        count = sum(one == rule for one in dropped.values())
        session.execute(update(ErasureRequest).where(ErasureRequest.id == rule.id).values({column: column + count}))
    if dropped:
        session.execute(delete(Feedback).where(Feedback.interaction_id.in_(dropped)))
    return _unspelled(session, [row for row in rows if row["id"] not in dropped])


def _rules_about(session: Session, rows: Sequence[dict[str, Any]]) -> list[Rule]:
    """Requests that name somebody of these rows, however long ago: an answer may come to land long after."""
    names = {row[column] for row in rows for column in ("end_user", "session_key") if row[column]}
    if not names:
        return []
    found = select(ErasureRequest).where(ErasureRequest.subject.in_([*names, *map(hashed, names)]))
    return [Rule.of(one) for one in session.scalars(found)]


def _unspelled(session: Session, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gateways hold corrections in memory, so one may be placed in a prompt at the moment when it is erased."""
    shown = {UUID(one) for row in rows for one in row["worked_examples"]}
    if not shown:
        return rows
    erased = select(Example.id).where(Example.id.in_(shown), Example.content_hash.startswith(ERASED))
    gone = {str(one) for one in session.scalars(erased)}
    emptied: dict[str, list[Any]] = {"prompt_token_ids": [], "worked_examples": []}
    return [{**row, **emptied} if gone.intersection(row["worked_examples"]) else row for row in rows]
