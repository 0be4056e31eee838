"""How people leave: shut out and let in again, or deleted for good.

Deleting pseudonymises. The account row stays, so that judgements keep an author, but its name becomes
"former reviewer <short id>" and its address is gone; sessions, links, roles, identities and invitations are removed;
the address and the name are taken out of every other place that holds them. The audit log refers to people by their
account's id, which says nothing about anybody once the account is empty. Where an older row or a typed reason does hold
the address or the name, it is redacted (`services.store.audit.redact`), and the chain still verifies.
"""

import json
import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast, delete, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from services.errors import Conflict, Forbidden, NotFound
from services.store import audit, logins, people, roles
from services.store.models import (
    ApiKey,
    AuditEvent,
    DatasetImport,
    DeploymentEvent,
    ErasureRequest,
    Invitation,
    Job,
    LoginSession,
    Membership,
    Pin,
    Run,
    RunEvent,
    SavedView,
    SignInLink,
    UserAccount,
    UserIdentity,
)
from services.store.roles import Authority

# Where a person may be named outside the audit log: who started or changed what, and why.
NAMING: tuple[tuple[Any, ...], ...] = (
    (Run, "created_by"),
    (RunEvent, "payload"),
    (DeploymentEvent, "actor", "reason", "evidence"),
    (Job, "payload"),
    (ApiKey, "name"),
    (Pin, "withdrawn_by", "reason"),
    (DatasetImport, "created_by", "file_name"),
    (ErasureRequest, "asked_by"),
)

TYPED = ("reason", "name", "file_name")


def short_id(user_id: UUID) -> str:
    """The end of an id: the beginning of a UUIDv7 is the time, which would say when somebody joined."""
    return user_id.hex[-8:]


def former_name(user_id: UUID) -> str:
    """What a deleted person is called from then on."""
    return f"former reviewer {short_id(user_id)}"


def disable(session: Session, by: Authority, user_id: UUID) -> None:
    """Shut an account: sessions end, links and keys that act as the person stop. Roles stay, should it be opened again.

    Raises Forbidden unless `by` administers all the person reaches, Conflict for the last administrator.
    """
    user = _overseen(session, by, user_id)
    if user.disabled_at is not None:
        raise Conflict("this account is shut already")
    _keep_an_administrator(session, user_id)
    people.disable(session, user_id)
    roles.release_leases(session, user_id)
    audit.record(session, by.actor, "user.disable", f"user:{user_id}")


def enable(session: Session, by: Authority, user_id: UUID) -> None:
    """Let somebody in again; they need a new sign-in link."""
    user = _overseen(session, by, user_id)
    if user.disabled_at is None:
        raise Conflict("this account is open already")
    user.disabled_at = None
    session.flush()
    audit.record(session, by.actor, "user.enable", f"user:{user_id}")


def delete_user(session: Session, by: Authority, user_id: UUID) -> str:
    """Delete a person for good and return what they are called now. Raises as `disable`."""
    user = _overseen(session, by, user_id)
    _keep_an_administrator(session, user_id)
    email, name = user.email, user.name
    logins.end_all(session, by.actor, user_id)
    roles.release_leases(session, user_id)
    for table in (LoginSession, SignInLink, Membership, UserIdentity):
        session.execute(delete(table).where(table.user_id == user_id))
    session.execute(delete(Invitation).where(or_(Invitation.user_id == user_id, Invitation.email == email)))
    # Shared ones are the project's by now; nobody else ever sees the others.
    session.execute(delete(SavedView).where(SavedView.user_id == user_id, ~SavedView.shared))
    now = datetime.now(UTC)
    acting = (ApiKey.user_id == user_id) & ApiKey.revoked_at.is_(None)
    session.execute(update(ApiKey).where(acting).values(revoked_at=now))
    user.name = former_name(user_id)
    user.email = f"deleted:{user_id}"  # no address: nothing that looks like one can match it
    user.deleted_at, user.disabled_at = now, user.disabled_at or now
    session.flush()
    audit.record(session, by.actor, "user.delete", f"user:{user_id}")
    _forget(session, by, Traces(email, name, user_id))
    return user.name


def _overseen(session: Session, by: Authority, user_id: UUID) -> UserAccount:
    """The account, locked against other changes of people. Raises NotFound, Forbidden."""
    roles.lock(session)
    user = session.get(UserAccount, user_id, populate_existing=True)
    if user is None or user.deleted_at is not None:
        raise NotFound("there is no such person")
    if not by.oversees(roles.memberships(session, user_id)):
        raise Forbidden("only who administers everything a person reaches may do this", code="insufficient_role")
    return user


def _keep_an_administrator(session: Session, user_id: UUID) -> None:
    if any(row.role == "admin" and row.project_id is None for row in roles.memberships(session, user_id)):
        roles.keep_an_administrator(session, user_id)


# --- what else knows them ---------------------------------------------------------------------------------


class Traces:
    """Where a person's address and name may stand in text, and what stands there afterwards.

    A name of one word is looked for in sentences only. Elsewhere the word may be Whet's own: somebody who calls
    themselves "reviewer" and leaves must not take the roles out of the audit log.
    """

    def __init__(self, email: str, name: str, user_id: UUID) -> None:
        self.email = email
        self.replacement = former_name(user_id)
        address = rf"(?i:{re.escape(email)})"
        # The name as whole words as it is written, for many names are also ordinary words.
        self.in_sentences = re.compile(rf"{address}|(?<!\w){re.escape(name)}(?!\w)")
        self.anywhere = self.in_sentences if " " in name else re.compile(address)
        # As text, and as it stands inside a JSON document.
        self.likely = {
            _literal(form) for words in (email, name) for form in (words, json.dumps(words, ensure_ascii=False)[1:-1])
        }

    def within(self, *columns: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
        """Rows that may hold a trace; `scrub` decides."""
        return or_(*(cast(column, Text).ilike(f"%{words}%") for column in columns for words in self.likely))

    def scrub(self, value: Any, *, typed: bool = False) -> Any:  # noqa: ANN401 - any JSON
        """The value with every trace replaced, keys of documents included. `typed` is what a person wrote."""
        if isinstance(value, str):
            pattern = self.in_sentences if typed or " " in value else self.anywhere
            return pattern.sub(self.replacement, value)
        if isinstance(value, list):
            return [self.scrub(one) for one in value]
        if isinstance(value, dict):
            return {self.scrub(key): self.scrub(one) for key, one in value.items()}
        return value


def _literal(words: str) -> str:
    """Words, not a LIKE pattern."""
    return words.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")


def _forget(session: Session, by: Authority, traces: Traces) -> None:
    """Take address and name out of the rows that hold them, and redact the audit log."""
    for table, *columns in NAMING:
        held = traces.within(*(getattr(table, column) for column in columns))
        for row in session.scalars(select(table).where(held)):
            for column in columns:
                setattr(row, column, traces.scrub(getattr(row, column), typed=column in TYPED))
    session.flush()
    told = traces.within(AuditEvent.actor, AuditEvent.subject, AuditEvent.detail)
    audit.redact(session, by.actor, session.scalars(select(AuditEvent).where(told)).all(), traces.scrub)
