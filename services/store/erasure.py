"""Erasing an end user or a session: who asked, what it covers, and taking it out of the tables.

An erasure covers what its subject asked before the request, whenever that comes to land; what they ask later is new.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus
from uuid import UUID

from sqlalchemy import ColumnElement, Text, and_, cast, delete, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import audit, jobs
from services.store.base import uuid7
from services.store.erasure_places import PLACES, By, Emptied, Gone
from services.store.models import (
    ERASURE_KINDS,
    BulkAction,
    Dataset,
    DatasetImport,
    ErasureRequest,
    Example,
    Feedback,
    Interaction,
    InteractionBody,
    Job,
    ReviewItem,
    Revision,
    RevisionExample,
    Run,
    SavedView,
    SplitGroup,
)

JOB = "erase"
LONGEST_SUBJECT = 512
HASHED = "sha256:"
ERASED = "erased:"
UNFINISHED = ("queued", "running")


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


def checked(project_id: UUID | None, kind: str, name: str) -> Subject:
    """A subject as the log would hold it. Raises InvalidRequest."""
    if kind not in ERASURE_KINDS:
        raise InvalidRequest(f"erase an {' or a '.join(ERASURE_KINDS)}, not {kind!r}", param="kind")
    if not name or len(name) > LONGEST_SUBJECT or any("\ud800" <= one <= "\udfff" for one in name):
        raise InvalidRequest(f"name whom to erase, in 1 to {LONGEST_SUBJECT} characters", param="subject")
    return Subject(project_id, kind, name.replace("\0", "\ufffd"))


# --- asking -----------------------------------------------------------------------------------------------


def request(session: Session, subject: Subject, asked_by: str) -> ErasureRequest:
    """Record the request and queue its job. Raises Conflict while the same one is unfinished."""
    same = select(ErasureRequest.id).where(
        ErasureRequest.state.in_(UNFINISHED), ErasureRequest.kind == subject.kind,
        ErasureRequest.subject == subject.name, ErasureRequest.project_id.is_not_distinct_from(subject.project_id),
    )  # fmt: skip
    if session.scalar(same.limit(1)) is not None:
        raise Conflict("this erasure is under way already")
    made = ErasureRequest(
        id=uuid7(), project_id=subject.project_id, kind=subject.kind, subject=subject.name, asked_by=asked_by
    )
    session.add(made)
    session.flush()
    _enqueue(session, made)
    detail = {"kind": subject.kind, "subject": hashed(subject.name)}
    audit.record(session, asked_by, "erasure.request", f"erasure:{made.id}", detail)
    return made


def _enqueue(session: Session, made: ErasureRequest) -> None:
    # Nobody may read the subject in the ledger: the job knows the request's id.
    payload, dedupe_key = {"request_id": str(made.id)}, f"{JOB}:{made.id}"
    job = jobs.enqueue(session, JOB, payload, project_id=made.project_id, dedupe_key=dedupe_key, priority=50)
    made.job_id, made.state = job.id, "queued"
    session.flush()


def again(session: Session, made: ErasureRequest) -> ErasureRequest:
    """Go on with one that failed; what it has done stays done. Raises Conflict for any other."""
    if made.state != "failed":
        raise Conflict(f"this erasure is {made.state}; only a failed one is taken up again")
    _enqueue(session, made)
    return made


def get(session: Session, request_id: UUID, project_id: UUID | None = None) -> ErasureRequest:
    """A request; with `project_id` only one of that project. Raises NotFound."""
    found = session.get(ErasureRequest, request_id, populate_existing=True)
    if found is None or project_id not in (None, found.project_id):
        raise NotFound(f"there is no erasure {request_id} here")
    return found


def list_(session: Session, project_id: UUID | None, *, limit: int = 50) -> list[ErasureRequest]:
    """Newest first; with `project_id` that project's and those of all projects."""
    query = select(ErasureRequest)
    if project_id is not None:
        query = query.where(or_(ErasureRequest.project_id == project_id, ErasureRequest.project_id.is_(None)))
    return list(session.scalars(query.order_by(ErasureRequest.id.desc()).limit(limit)))


def settle(session: Session) -> list[UUID]:
    """Requests whose job ended without finishing them have failed; returns them."""
    ended = (
        select(ErasureRequest)
        .join(Job, Job.id == ErasureRequest.job_id)
        .where(ErasureRequest.state.in_(UNFINISHED), Job.state.in_(("failed", "cancelled", "dead")))
    )
    found = session.scalars(ended.with_for_update(of=ErasureRequest, skip_locked=True)).all()
    for one in found:
        one.state = "failed"
    session.flush()
    return [one.id for one in found]


def preview(session: Session, subject: Subject) -> dict[str, int]:
    """Rows by table that an erasure would delete or empty now."""
    ids = select(Interaction.id).where(*asked_by(subject, func.now())).scalar_subquery()
    examples = select(Example.id).where(Example.interaction_id.in_(ids), ~Example.content_hash.startswith(ERASED))
    interactions = list(session.scalars(select(Interaction.id).where(*asked_by(subject, func.now()))))
    found: dict[str, int] = {}
    for table, (key, by) in _existing(session).items():
        rows = list(session.scalars(examples)) if by == "example" else interactions
        count = session.scalar(text(f"SELECT count(*) FROM {table} WHERE {key} = ANY(:ids)"), {"ids": rows})
        found[table] = int(count or 0)
    return found


# --- what is covered --------------------------------------------------------------------------------------


def asked_by(subject: Subject, until: Any) -> list[ColumnElement[bool]]:  # noqa: ANN401 - a moment or an expression
    """Conditions on interactions: asked by the subject, before `until`."""
    column = Interaction.end_user if subject.kind == "end_user" else Interaction.session_key
    conditions = [column == subject.name, Interaction.started_at <= until]
    return [*conditions, Interaction.project_id == subject.project_id] if subject.project_id else conditions


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

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the log, or what it is about to be, belongs to the subject."""
        name = row.get(self.subject.kind if self.subject.kind == "end_user" else "session_key")
        here = self.subject.project_id in (None, row.get("project_id"))
        named = isinstance(name, str) and self.subject.name in (name, hashed(name))
        return here and named and row["started_at"] <= self.asked_at


def rules(session: Session) -> list[Rule]:
    """Every request there ever was: an answer may come to land long after."""
    found = session.scalars(select(ErasureRequest))
    return [Rule(one.id, Subject.of(one), one.created_at, one.finished_at is not None) for one in found]


def drop_covered(session: Session, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that may land; the others are counted on their request, and what was said of them is deleted."""
    known = rules(session)
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
    return [row for row in rows if row["id"] not in dropped]


# --- taking out -------------------------------------------------------------------------------------------


def next_interactions(session: Session, made: ErasureRequest, limit: int) -> list[UUID]:
    """Interactions still to erase: those in the log, then those whose log has passed its retention."""
    subject = Subject.of(made)
    found = list(session.scalars(select(Interaction.id).where(*asked_by(subject, made.created_at)).limit(limit)))
    return found or _left_behind(session, subject, made.created_at, limit)


def _left_behind(session: Session, subject: Subject, until: datetime, limit: int) -> list[UUID]:
    """By the group, which is the subject's name where the app gave no other. A group of a living log may be anybody's,
    so only rows without one count."""
    found: list[UUID] = []
    for model in (ReviewItem, Example):
        logged = select(Interaction.id).where(Interaction.id == model.interaction_id).exists()
        query = select(model.interaction_id).where(
            model.group_key == subject.name, model.interaction_id.is_not(None), model.created_at <= until, ~logged
        )
        if subject.project_id is not None:
            query = query.where(model.project_id == subject.project_id)
        found += [one for one in session.scalars(query.limit(limit)) if one is not None]
    return list(dict.fromkeys(found))


def erase(session: Session, interaction_ids: Collection[UUID]) -> Counter[str]:
    """Take these interactions and everything made of them out of the tables; rows deleted or emptied, by table."""
    session.execute(text("SET LOCAL whet.erasing = 'on'"))
    examples = select(Example.id).where(
        Example.interaction_id.in_(interaction_ids), ~Example.content_hash.startswith(ERASED)
    )
    ids = {"interaction": list(interaction_ids), "example": list(session.scalars(examples))}
    counts: Counter[str] = Counter()
    for table, (key, by) in _existing(session).items():
        if ids[by]:
            counts[table] += session.execute(text(_statement(session, table, key)), {"ids": ids[by]}).rowcount  # type: ignore[attr-defined]
    session.execute(text("SET LOCAL whet.erasing = 'off'"))
    return counts


def _statement(session: Session, table: str, key: str) -> str:
    """Names come from the registry above, never from outside."""
    place = PLACES[table]
    if isinstance(place, Gone):
        return f"DELETE FROM {table} WHERE {key} = ANY(:ids)"
    assert isinstance(place, Emptied)
    there = columns(session)[table]
    changes = ", ".join(f'"{name}" = {value}' for name, value in place.to.items() if name in there)
    return f"UPDATE {table} SET {changes} WHERE {key} = ANY(:ids)"


def _existing(session: Session) -> dict[str, tuple[str, By]]:
    """The registry's tables that this database has, in its order: key column and what the key names."""
    there = columns(session)
    found: dict[str, tuple[str, By]] = {}
    for table, place in PLACES.items():
        if table in there and isinstance(place, Gone | Emptied):
            found[table] = (next(name for name in place.key if name in there[table]), place.by)
    return found


def columns(session: Session) -> dict[str, set[str]]:
    """Column names by table."""
    rows = session.execute(
        text("SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'")
    )
    found: dict[str, set[str]] = {}
    for table, column in rows:
        found.setdefault(table, set()).add(column)
    return found


def erase_said(session: Session, made: ErasureRequest) -> int:
    """Feedback that the subject wrote about anybody's answer; returns how many rows."""
    if made.kind != "end_user":
        return 0
    mine = [Feedback.author == made.subject, Feedback.created_at <= made.created_at]
    if made.project_id is not None:
        mine.append(Feedback.project_id == made.project_id)
    return len(session.scalars(delete(Feedback).where(*mine).returning(Feedback.id)).all())


def forget_shown(session: Session, project_ids: Collection[UUID]) -> int:
    """Prompts of others in which an erased correction stood as a worked example: their tokens spell it."""
    erased = select(Example.id).where(Example.project_id.in_(project_ids), Example.content_hash.startswith(ERASED))
    ids = [str(one) for one in session.scalars(erased)]
    if not ids:
        return 0
    emptied = update(InteractionBody).where(
        InteractionBody.worked_examples != [], InteractionBody.worked_examples.has_any(cast(ids, ARRAY(Text)))
    )
    changed = emptied.values(prompt_token_ids=[], worked_examples=[]).returning(InteractionBody.id)
    return len(session.scalars(changed).all())


def forget_quotes(session: Session, project_ids: Collection[UUID], until: datetime) -> int:
    """Errors and log tails of finished work may quote a row, as database errors do: none of them is kept."""
    over = [Job.project_id.in_(project_ids), Job.created_at <= until, Job.state.not_in(UNFINISHED)]
    quoted = or_(Job.error.is_not(None), Job.log_tail.is_not(None))
    emptied = session.execute(update(Job).where(*over, quoted).values(error=None, log_tail=None)).rowcount  # type: ignore[attr-defined]
    ended = [Run.project_id.in_(project_ids), Run.created_at <= until, Run.state.not_in(UNFINISHED)]
    session.execute(
        update(Run).where(*ended, Run.error.is_not(None)).values(error="no longer kept: somebody's data was erased")
    )
    return int(emptied)


def forget_typed(session: Session, made: ErasureRequest, project_ids: Collection[UUID]) -> int:
    """What people typed or uploaded that names the subject or may quote them; how many rows were touched."""
    name = made.subject
    typed = (name, quote_plus(name), quote(name), json.dumps(name)[1:-1])

    def names_it(column: Any) -> ColumnElement[bool]:  # noqa: ANN401 - a column
        return or_(*(cast(column, Text).contains(one, autoescape=True) for one in typed))

    here = SavedView.project_id.in_(project_ids)
    orders = [
        delete(SavedView).where(here, or_(names_it(SavedView.query), names_it(SavedView.name))),
        update(BulkAction)
        .where(
            BulkAction.project_id.in_(project_ids), BulkAction.state.not_in(("queued", "running", "undoing")),
            or_(names_it(BulkAction.selection), names_it(BulkAction.params)),
        )
        .values(selection={}, params={}, error=None),
        delete(DatasetImport).where(
            DatasetImport.state == "preview",
            DatasetImport.dataset_id.in_(select(Dataset.id).where(Dataset.project_id.in_(project_ids))),
        ),
        delete(SplitGroup).where(SplitGroup.project_id.in_(project_ids), SplitGroup.group_key == name),
        update(Revision)
        .where(
            Revision.report.has_key("phrases"),
            Revision.id.in_(
                select(RevisionExample.revision_id)
                .join(Example, Example.id == RevisionExample.example_id)
                .where(Example.project_id.in_(project_ids), Example.content_hash.startswith(ERASED))
            ),
        )
        .values(report=Revision.report.op("-")("phrases")),
    ]  # fmt: skip
    return sum(
        session.execute(order, execution_options={"synchronize_session": False}).rowcount  # type: ignore[attr-defined]
        for order in orders
    )
