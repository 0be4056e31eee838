"""Invitations: one-time links that make an account with a role.

A link is worth what whoever made it holds when it is used, not when it was made. It makes new accounts only: who has
one accepts while signed in, so that nobody becomes somebody else by inviting them.
"""

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from services.errors import Conflict, Forbidden, NotFound, Unauthenticated
from services.store import audit, keys, people, roles
from services.store.models import Invitation, Project, UserAccount
from services.store.roles import Authority

LIFETIME = timedelta(days=7)
KEPT = timedelta(days=30)


class Made(NamedTuple):
    """An invitation and its token, in plain text for the only time."""

    invitation: Invitation
    token: str


class Shown(NamedTuple):
    """An invitation as it is listed: which project (None: every), who made it, and where it stands."""

    invitation: Invitation
    project: Project | None
    inviter: str | None
    state: str


class Accepted(NamedTuple):
    """Whose account it is now, and whether the link made it."""

    user: UserAccount
    created: bool


def state_of(invitation: Invitation) -> str:
    """`open`, `accepted`, `revoked` or `expired`."""
    if invitation.accepted_at is not None:
        return "accepted"
    if invitation.revoked_at is not None:
        return "revoked"
    return "open" if invitation.expires_at > datetime.now(UTC) else "expired"


def invite(
    session: Session, by: Authority, *, email: str, role: str, project_id: UUID | None, name: str = "",
    lifetime: timedelta = LIFETIME,
) -> Made:  # fmt: skip
    """A new link for somebody who has no account; an earlier open one for the same place is revoked.

    Raises Forbidden for a role above the inviter's, Conflict when the address has an account: give that a role instead.
    """
    email, name = people.checked(email, name)
    people.check_role(role)
    roles.lock(session)
    roles.check(by, role, project_id)
    if session.scalar(select(UserAccount.id).where(UserAccount.email == email)) is not None:
        raise Conflict(f"{email} has an account already: give it a role", code="has_account")
    _tidy(session)
    for earlier in _open(session, email):
        if earlier.project_id == project_id:
            earlier.revoked_at = datetime.now(UTC)
    token = secrets.token_urlsafe(32)
    made = Invitation(
        token_hash=_hash(token), email=email, name=name, role=role, project_id=project_id, invited_by=by.user_id,
        invited_by_key=by.key_id, expires_at=datetime.now(UTC) + lifetime,
    )  # fmt: skip
    session.add(made)
    session.flush()
    detail = {"role": role, "project": roles.slug_of(session, project_id)}
    audit.record(session, by.actor, "invitation.create", f"invitation:{made.id}", detail)
    return Made(made, token)


def find(session: Session, token: str) -> Shown:
    """The open invitation behind a link. Raises Unauthenticated when it is unknown, used, revoked or expired."""
    found = session.scalar(select(Invitation).where(Invitation.token_hash == _hash(token)))
    if found is None or state_of(found) != "open":
        raise Unauthenticated("this invitation was used already, was revoked or has expired", code="bad_link")
    return _shown(session, found)


def accept(session: Session, token: str, as_user: UUID | None) -> Accepted:
    """Use a link up: the account is made, or the person who is signed in gets the role.

    Raises Unauthenticated for a dead link and when the address has an account that is not signed in, Forbidden when
    whoever made the link may not give the role any more.
    """
    roles.lock(session)
    found = find(session, token).invitation
    _check_inviter(session, found)
    holder = session.scalar(select(UserAccount).where(UserAccount.email == found.email))
    if holder is not None and holder.id != as_user:
        raise Unauthenticated(
            "there is an account for this address already: sign in to it, then open the invitation again",
            code="has_account",
        )
    user = holder or people.create_user(session, email=found.email, name=found.name)
    use_up(session, found, user.id)
    return Accepted(user, holder is None)


def accept_by_address(session: Session, email: str, user_id: UUID) -> int:
    """Accept every open invitation for an address a provider vouches for; how many there were."""
    accepted = 0
    for found in waiting(session, email):
        use_up(session, found, user_id)
        accepted += 1
    return accepted


def waiting(session: Session, email: str) -> list[Invitation]:
    """The open invitations of an address whose makers may still give what they promise."""
    found = []
    for invitation in _open(session, email):
        try:
            _check_inviter(session, invitation)
        except Forbidden:
            continue
        found.append(invitation)
    return found


def use_up(session: Session, invitation: Invitation, user_id: UUID) -> None:
    """Mark it accepted and give its role; somebody who holds more there keeps that."""
    invitation.accepted_at, invitation.user_id = datetime.now(UTC), user_id
    session.flush()
    held = {row.project_id: row.role for row in roles.memberships(session, user_id)}.get(invitation.project_id)
    if people.rank(invitation.role) > people.rank(held):
        people.grant(session, user_id, invitation.role, invitation.project_id)
    detail = {"role": invitation.role, "project": roles.slug_of(session, invitation.project_id)}
    audit.record(session, f"user:{user_id}", "invitation.accept", f"invitation:{invitation.id}", detail)


def revoke(session: Session, by: Authority, invitation_id: UUID) -> Invitation:
    """End a link. Raises Forbidden as `invite`, Conflict when it was used or is over."""
    roles.lock(session)  # `accept` holds it: a link is either used or revoked
    found = session.get(Invitation, invitation_id, populate_existing=True)
    if found is None or not by.manages(found.project_id):
        raise NotFound("there is no such invitation")
    roles.check(by, found.role, found.project_id)
    if state_of(found) != "open":
        raise Conflict(f"this invitation is {state_of(found)}")
    found.revoked_at = datetime.now(UTC)
    session.flush()
    audit.record(session, by.actor, "invitation.revoke", f"invitation:{found.id}")
    return found


def list_(session: Session, project_id: UUID | None, *, everywhere: bool = False) -> list[Shown]:
    """Those of a project, or of no single project; with `everywhere` all of them. Newest first, open ones on top."""
    query = select(Invitation).order_by(Invitation.id.desc()).limit(500)
    if not everywhere:
        here = Invitation.project_id.is_(None) if project_id is None else Invitation.project_id == project_id
        query = query.where(here)
    shown = [_shown(session, row) for row in session.scalars(query)]
    return sorted(shown, key=lambda one: one.state != "open")


def _shown(session: Session, row: Invitation) -> Shown:
    inviter = session.get(UserAccount, row.invited_by) if row.invited_by else None
    project = session.get(Project, row.project_id) if row.project_id else None
    return Shown(row, project, inviter.name if inviter else None, state_of(row))


def _open(session: Session, email: str) -> list[Invitation]:
    query = select(Invitation).where(
        Invitation.email == email, Invitation.accepted_at.is_(None), Invitation.revoked_at.is_(None),
        Invitation.expires_at > func.now(),
    )  # fmt: skip
    return list(session.scalars(query.order_by(Invitation.id).with_for_update()))


def _check_inviter(session: Session, found: Invitation) -> None:
    """Raises Forbidden when whoever made the link has lost the right to give its role."""
    if found.invited_by_key is not None and not keys.stands(session, found.invited_by_key):
        raise Forbidden("the API key that made this invitation is over; ask for a new one")
    if found.invited_by is None:
        return
    inviter = session.get_one(UserAccount, found.invited_by)
    by = Authority.of_user(session, inviter.id)
    if inviter.disabled_at is not None or not by.outranks(found.role, found.project_id):
        raise Forbidden("whoever sent this invitation may not give this role any more; ask for a new one")


def _tidy(session: Session) -> None:
    """An address is kept no longer than the invitation is of use."""
    over = or_(
        Invitation.accepted_at.is_not(None), Invitation.revoked_at.is_not(None), Invitation.expires_at < func.now()
    )  # fmt: skip
    session.execute(delete(Invitation).where(over, Invitation.created_at < datetime.now(UTC) - KEPT))


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()
