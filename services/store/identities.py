"""Accounts of people whom an OIDC provider vouches for: invited ones, and those of allow-listed domains."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.errors import Forbidden
from services.store import audit, invitations, people, roles
from services.store.models import UserAccount, UserIdentity


class Vouched(NamedTuple):
    """What a verified ID token says. `email` counts only when the provider has verified it."""

    issuer: str
    subject: str
    email: str
    email_verified: bool
    name: str


class Admission(NamedTuple):
    """Whose addresses need no invitation, and the role they get on every project ("" for none)."""

    domains: Sequence[str]
    role: str


def admit(session: Session, vouched: Vouched, admission: Admission) -> UserAccount:
    """The account of somebody who came by OIDC, made when they were invited or their domain is allow-listed.

    The provider's own name for a person decides; the address only finds an account the first time. Raises Forbidden,
    with one sentence for everybody the platform does not know.
    """
    roles.lock(session)
    known = session.get(UserIdentity, (vouched.issuer, vouched.subject))
    if known is not None:
        user = session.get_one(UserAccount, known.user_id)
        if user.disabled_at is not None:
            raise Forbidden("this account is shut; ask an administrator", code="account_disabled")
        if vouched.email_verified and vouched.email == user.email:
            invitations.accept_by_address(session, user.email, user.id)
        return user
    if not vouched.email_verified or not vouched.email:
        raise Forbidden("your provider does not vouch for your e-mail address", code="email_unverified")
    user = _by_address(session, vouched) or _newcomer(session, vouched, admission)
    session.add(UserIdentity(issuer=vouched.issuer, subject=vouched.subject, user_id=user.id))
    session.flush()
    audit.record(session, f"user:{user.id}", "identity.link", f"user:{user.id}", {"issuer": vouched.issuer})
    invitations.accept_by_address(session, vouched.email, user.id)
    return user


def _by_address(session: Session, vouched: Vouched) -> UserAccount | None:
    """An account that exists. An address that a provider gave to somebody new does not open the old one's account."""
    user = session.scalar(select(UserAccount).where(UserAccount.email == vouched.email))
    if user is None:
        return None
    if user.disabled_at is not None:
        raise Forbidden("this account is shut; ask an administrator", code="account_disabled")
    linked = select(UserIdentity).where(UserIdentity.user_id == user.id, UserIdentity.issuer == vouched.issuer)
    if session.scalar(linked) is not None:
        raise Forbidden("this address belongs to another person of your provider; ask an administrator")
    return user


def _newcomer(session: Session, vouched: Vouched, admission: Admission) -> UserAccount:
    listed = vouched.email.rpartition("@")[2] in admission.domains
    if not listed and not invitations.waiting(session, vouched.email):
        raise Forbidden("nobody has invited you; ask an administrator for an invitation", code="not_invited")
    user = people.create_user(session, email=vouched.email, name=vouched.name[:200].replace("\x00", ""))
    detail = {"by": "domain" if listed else "invitation"}
    audit.record(session, f"user:{user.id}", "user.join", f"user:{user.id}", detail)
    if listed and admission.role:
        people.grant(session, user.id, admission.role)
    return user
