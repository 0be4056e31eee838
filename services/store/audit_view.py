"""The audit log as people read it: filters, pages, and names in place of ids."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Text, cast, false, func, or_, select, union_all
from sqlalchemy.orm import Session

from services.store.models import (
    ApiKey,
    AuditEvent,
    BulkAction,
    Dataset,
    ErasureRequest,
    Invitation,
    Project,
    Revision,
    Run,
    UserAccount,
)

WINDOWS = {"day": timedelta(days=1), "week": timedelta(days=7), "month": timedelta(days=30), "all": None}
REFERENCE = re.compile(r"(user|key|invitation|project):(\S+)")
FOUND_AT_MOST = 500
BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the log is narrowed to; empty strings leave a field alone. `who` is part of a name, address, key or id.
    `project` leaves what happened to that project and its people, keys, runs and data."""

    who: str = ""
    action: str = ""
    about: str = ""
    window: str = "all"
    project: Project | None = None

    @classmethod
    def asked(
        cls, *, who: str = "", action: str = "", about: str = "", window: str = "all", project: Project | None = None
    ) -> "Search":
        """From an address: NUL is no text, an unknown window is all time."""
        typed = [text.replace("\x00", "").strip() for text in (who, action, about)]
        window = window if window in WINDOWS else "all"
        return cls(who=typed[0], action=typed[1], about=typed[2], window=window, project=project)

    @property
    def chosen(self) -> dict[str, str]:
        """The fields of an address that somebody chose, the project left out."""
        fields = {"who": self.who, "action": self.action, "about": self.about, "window": self.window}
        return {name: value for name, value in fields.items() if value and (name, value) != ("window", "all")}


class Line(NamedTuple):
    """An event with its actor and subject in words; `who_title` and `about_title` are the references behind them."""

    event: AuditEvent
    who: str
    who_title: str
    about: str
    about_title: str


def lines(session: Session, search: Search, *, before: int | None = None, limit: int = 50) -> list[Line]:
    """Newest first, older than event `before`."""
    query = select(AuditEvent).where(*_conditions(session, search)).order_by(AuditEvent.id.desc()).limit(limit)
    if before is not None:
        query = query.where(AuditEvent.id < before)
    return named(session, session.scalars(query).all())


def actions(session: Session, project: Project | None = None) -> list[str]:
    """Every action the log holds, or holds of a project, sorted."""
    query = select(AuditEvent.action).where(*_conditions(session, Search(project=project)))
    return list(session.scalars(query.distinct().order_by(AuditEvent.action)))


def named(session: Session, events: Sequence[AuditEvent]) -> list[Line]:
    """Events with names; the references of a page are looked up together."""
    called = names(session, [text for event in events for text in (event.actor, event.subject)])

    def said(reference: str) -> str:
        return called.get(reference, reference)

    return [Line(event, said(event.actor), event.actor, said(event.subject), event.subject) for event in events]


def export(session: Session, search: Search) -> Iterator[dict[str, Any]]:
    """Oldest first, as hashed. `hashed_detail` is the text the hash covers: JSON may be written in several ways."""
    query = (
        select(AuditEvent, cast(AuditEvent.detail, Text).label("detail_text"))
        .where(*_conditions(session, search))
        .order_by(AuditEvent.id)
        .execution_options(yield_per=BATCH)
    )
    for event, detail in session.execute(query):
        yield {
            "id": event.id, "at": event.at.astimezone(UTC).isoformat(timespec="microseconds"), "actor": event.actor,
            "action": event.action, "subject": event.subject, "detail": event.detail, "hashed_detail": detail,
            "previous_hash": event.previous_hash, "hash": event.hash, "redacted": event.redacted_at is not None,
        }  # fmt: skip


def _conditions(session: Session, search: Search) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [_of(search.project)] if search.project else []
    span = WINDOWS.get(search.window)
    if span is not None:
        conditions.append(AuditEvent.at >= datetime.now(UTC) - span)
    if search.action:
        conditions.append(AuditEvent.action == search.action)
    if search.who:
        conditions.append(_mentions(session, AuditEvent.actor, search.who))
    if search.about:
        conditions.append(_mentions(session, AuditEvent.subject, search.about))
    return conditions


def _of(project: Project) -> ColumnElement[bool]:
    """What an event of this project looks like: it is about the project, or a thing that is the project's alone, or
    says that it happened there. A person's session or deletion is nobody's project."""
    here = project.id
    things: list[Select[Any]] = [
        select("run:" + cast(Run.id, Text)).where(Run.project_id == here),
        select("bulk:" + cast(BulkAction.id, Text)).where(BulkAction.project_id == here),
        select("erasure:" + cast(ErasureRequest.id, Text)).where(ErasureRequest.project_id == here),
        select("key:" + ApiKey.prefix).where(ApiKey.project_id == here),
        select("invitation:" + cast(Invitation.id, Text)).where(Invitation.project_id == here),
        select("revision:" + Revision.digest)
        .join(Dataset, Dataset.id == Revision.dataset_id)
        .where(Dataset.project_id == here),
    ]
    return or_(
        AuditEvent.subject == f"project:{here}",
        AuditEvent.subject.in_(union_all(*things)),
        AuditEvent.detail["project"].astext == project.slug,
    )


def _mentions(session: Session, column: Any, words: str) -> ColumnElement[bool]:  # noqa: ANN401 - a mapped column
    """Rows whose reference contains the words, or refers to a person or key of that name."""
    literal = words.lower().replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
    pattern = f"%{literal}%"
    users = select(UserAccount.id).where(
        or_(func.lower(UserAccount.name).like(pattern), func.lower(UserAccount.email).like(pattern))
    )
    named_keys = select(ApiKey.prefix).where(func.lower(ApiKey.name).like(pattern))
    references = [f"user:{one}" for one in session.scalars(users.limit(FOUND_AT_MOST))]
    references += [f"key:{one}" for one in session.scalars(named_keys.limit(FOUND_AT_MOST))]
    return or_(func.lower(column).like(pattern), column.in_(references) if references else false())


def names(session: Session, references: Iterable[str]) -> dict[str, str]:
    """What references such as `user:<id>` are called, as far as they are known."""
    wanted: dict[str, set[str]] = {}
    for reference in references:
        parts = REFERENCE.fullmatch(reference)
        if parts:
            wanted.setdefault(parts[1], set()).add(parts[2])
    found: dict[str, str] = {}
    users = select(UserAccount.id, UserAccount.name).where(UserAccount.id.in_(_ids(wanted.get("user", ()))))
    found |= {f"user:{row.id}": row.name for row in session.execute(users)}
    held = select(ApiKey.prefix, ApiKey.name).where(ApiKey.prefix.in_(wanted.get("key", ())))
    found |= {f"key:{row.prefix}": f"key “{row.name}”" for row in session.execute(held)}
    sent = select(Invitation.id, Invitation.email).where(Invitation.id.in_(_ids(wanted.get("invitation", ()))))
    found |= {f"invitation:{row.id}": f"invitation of {row.email}" for row in session.execute(sent)}
    projects = select(Project.id, Project.name).where(Project.id.in_(_ids(wanted.get("project", ()))))
    found |= {f"project:{row.id}": f"project {row.name}" for row in session.execute(projects)}
    return found


def _ids(texts: Iterable[str]) -> list[UUID]:
    found = []
    for text in texts:
        try:
            found.append(UUID(text))
        except ValueError:
            continue
    return found
