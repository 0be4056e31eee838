"""People: accounts, roles, one-time sign-in links and browser sessions."""

import hashlib
import hmac
import re
import secrets
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import InvalidRequest, NotFound, Unauthenticated
from services.store import audit, logins
from services.store.base import uuid7
from services.store.models import ROLES, LoginSession, Membership, Project, SignInLink, UserAccount

LINK_LIFETIME = timedelta(hours=24)
SESSION_LIFETIME = timedelta(days=14)
EMAIL = re.compile(r"[^@\s\x00-\x1f]{1,64}@[^@\s\x00-\x1f]{1,190}")


class SignedIn(NamedTuple):
    """The cookie of a new session, in plain text for the only time, and whose it is."""

    cookie: str
    user_id: UUID


def rank(role: str | None) -> int:
    """Roles are a ladder: each may do what the ones below it may. No role is -1."""
    return ROLES.index(role) if role in ROLES else -1


def _link_hash(token: str) -> bytes:
    # 256 random bits need no pepper: there is nothing to guess from a stolen hash.
    return hashlib.sha256(token.encode()).digest()


def _session_hash(pepper: bytes, cookie: str) -> bytes:
    return hmac.digest(pepper, b"session:" + cookie.encode(errors="surrogatepass"), "sha256")


# --- accounts and roles -----------------------------------------------------------------------------------


def create_user(session: Session, *, email: str, name: str = "") -> UserAccount:
    """The account of an e-mail address, made when there is none. An existing account keeps its name."""
    email, name = checked(email, name)
    session.execute(
        insert(UserAccount).values(id=uuid7(), email=email, name=name).on_conflict_do_nothing(index_elements=["email"])
    )
    return session.scalars(select(UserAccount).where(UserAccount.email == email)).one()


def checked(email: str, name: str = "") -> tuple[str, str]:
    """An address as it is kept, and a name, which is the address's first part when none is given."""
    email = email.strip().lower()
    name = " ".join(_unseen(name).split()) or email.partition("@")[0]
    if not EMAIL.fullmatch(email):
        raise InvalidRequest(f"{email!r} is not an e-mail address", param="email")
    if len(name) > 200 or "\x00" in name:
        raise InvalidRequest("a name is at most 200 characters of text", param="name")
    return email, name


def _unseen(name: str) -> str:
    """A name without what nobody sees, which would let it reorder the line it stands in. Joiners belong to scripts."""
    return "".join(one for one in name if unicodedata.category(one) != "Cf" or one in "\u200c\u200d")


class Entry(NamedTuple):
    """An account in the list of everybody: its role on all projects, on how many single ones it has one, and when it
    was last seen."""

    user: UserAccount
    everywhere: str | None
    projects: int
    last_seen: datetime | None


def everybody(session: Session) -> list[Entry]:
    """Every account that is not deleted, by name, the shut ones last."""
    role = select(Membership.role).where(Membership.user_id == UserAccount.id, Membership.project_id.is_(None))
    single = select(func.count()).where(Membership.user_id == UserAccount.id, Membership.project_id.is_not(None))
    used = func.max(func.coalesce(LoginSession.last_seen_at, LoginSession.created_at))
    seen = select(used).where(LoginSession.user_id == UserAccount.id)
    query = (
        select(UserAccount, role.scalar_subquery(), single.scalar_subquery(), seen.scalar_subquery())
        .where(UserAccount.deleted_at.is_(None))
        .order_by(UserAccount.disabled_at.is_not(None), func.lower(UserAccount.name), UserAccount.id)
    )
    return [Entry(*row) for row in session.execute(query)]


def known(session: Session, email: str) -> UserAccount | None:
    """The account of an e-mail address, if there is one."""
    return session.scalar(select(UserAccount).where(UserAccount.email == email.strip().lower()))


def names_of(session: Session, emails: Iterable[str | None]) -> dict[str, str]:
    """The names behind addresses, as far as they are known."""
    wanted = {email for email in emails if email}
    rows = session.execute(select(UserAccount.email, UserAccount.name).where(UserAccount.email.in_(wanted)))
    return {row.email: row.name for row in rows}


def find_user(session: Session, email: str) -> UserAccount:
    """The account of an e-mail address. Raises NotFound."""
    user = known(session, email)
    if user is None:
        raise NotFound(f"there is no account {email!r}")
    return user


def grant(session: Session, user_id: UUID, role: str, project_id: UUID | None = None) -> None:
    """Give a role on one project, or on every project when `project_id` is None; replaces the one held there."""
    check_role(role)
    row = insert(Membership).values(id=uuid7(), user_id=user_id, project_id=project_id, role=role)
    session.execute(
        row.on_conflict_do_update(index_elements=["user_id", "project_id"], set_={"role": row.excluded.role})
    )


def check_role(role: str) -> None:
    """Raises InvalidRequest for what is no role."""
    if role not in ROLES:
        raise InvalidRequest(f"unknown role {role!r}: choose one of {', '.join(ROLES)}", param="role")


def role_on(session: Session, user_id: UUID, project_id: UUID | None) -> str | None:
    """The highest role someone has on a project; with None, the role held on every project."""
    here = or_(Membership.project_id.is_(None), Membership.project_id == project_id)  # "= NULL" is never true
    roles = session.scalars(select(Membership.role).where(Membership.user_id == user_id, here)).all()
    return max(roles, key=rank, default=None)


def projects_of(session: Session, user_id: UUID) -> list[Project]:
    """The projects someone has any role on, by name."""
    mine = select(Membership.project_id).where(Membership.user_id == user_id)
    everywhere = select(Membership.id).where(Membership.user_id == user_id, Membership.project_id.is_(None)).exists()
    query = select(Project).where(or_(everywhere, Project.id.in_(mine))).order_by(Project.name, Project.slug)
    return list(session.scalars(query))


def disable(session: Session, user_id: UUID) -> None:
    """Shut an account: its sessions end, its links die (opening it again does not revive them), its judgements stay."""
    now = datetime.now(UTC)
    session.execute(update(UserAccount).where(UserAccount.id == user_id).values(disabled_at=now))
    session.execute(
        update(LoginSession)
        .where(LoginSession.user_id == user_id, LoginSession.revoked_at.is_(None))
        .values(revoked_at=now)
    )
    session.execute(delete(SignInLink).where(SignInLink.user_id == user_id, SignInLink.used_at.is_(None)))


# --- signing in -------------------------------------------------------------------------------------------


def make_sign_in_link(session: Session, user_id: UUID, *, lifetime: timedelta = LINK_LIFETIME) -> str:
    """The token of a new one-time link, to be put behind `/sign-in/`. Only its hash is kept."""
    if session.get(UserAccount, user_id) is None:
        raise NotFound("there is no such person")
    token = secrets.token_urlsafe(32)
    expires = datetime.now(UTC) + lifetime
    session.add(SignInLink(token_hash=_link_hash(token), user_id=user_id, expires_at=expires))
    session.flush()
    return token


def redeem(session: Session, pepper: bytes, token: str, *, device: str = "") -> SignedIn:
    """Turn a link into a session, once. Raises Unauthenticated when it is unknown, used or expired."""
    claimed = (
        update(SignInLink)
        .where(
            SignInLink.token_hash == _link_hash(token),
            SignInLink.used_at.is_(None),
            SignInLink.expires_at > func.now(),
            SignInLink.user_id.in_(select(UserAccount.id).where(UserAccount.disabled_at.is_(None))),
        )
        .values(used_at=func.now())
        .returning(SignInLink.user_id)
    )
    user_id = session.scalar(claimed)
    if user_id is None:
        raise Unauthenticated("this sign-in link was used already or has expired; ask for a new one", code="bad_link")
    return start_session(session, pepper, user_id, method="link", device=device)


def start_session(session: Session, pepper: bytes, user_id: UUID, *, method: str, device: str = "") -> SignedIn:
    """A new browser session of somebody who has just proved who they are; recorded in the audit log."""
    cookie = secrets.token_urlsafe(32)
    login = LoginSession(
        token_hash=_session_hash(pepper, cookie), user_id=user_id, expires_at=datetime.now(UTC) + SESSION_LIFETIME,
        id=uuid7(), method=method, device=device[:100],
    )  # fmt: skip
    session.add(login)
    session.flush()
    detail = {"session": str(login.id), "by": method, "device": login.device}
    audit.record(session, f"user:{user_id}", "session.start", f"user:{user_id}", detail)
    return SignedIn(cookie, user_id)


def current(session: Session, pepper: bytes, cookie: str) -> logins.Current | None:
    """Whose session a cookie is, or None when it is unknown, ended, expired or its account is shut."""
    row = session.execute(
        select(UserAccount, LoginSession)
        .join(LoginSession, LoginSession.user_id == UserAccount.id)
        .where(
            LoginSession.token_hash == _session_hash(pepper, cookie),
            LoginSession.revoked_at.is_(None),
            LoginSession.expires_at > func.now(),
            UserAccount.disabled_at.is_(None),
        )
    ).one_or_none()
    return logins.Current(*row) if row else None
