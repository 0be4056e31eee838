"""Browser sessions as people see them: where they are signed in, since when, and how to end it."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store import audit
from services.store.models import LoginSession, UserAccount

SEEN_EVERY = timedelta(minutes=1)
# In this order: Edge and Opera also say Chrome, and Chrome also says Safari.
BROWSERS = (("Edg", "Edge"), ("OPR", "Opera"), ("Firefox", "Firefox"), ("Chrome", "Chrome"), ("Safari", "Safari"))
SYSTEMS = (
    ("iPhone", "iPhone"), ("iPad", "iPad"), ("Android", "Android"), ("Windows", "Windows"), ("Mac OS X", "macOS"),
    ("CrOS", "ChromeOS"), ("Linux", "Linux"),
)  # fmt: skip


class Current(NamedTuple):
    """Whose request it is, and by which session."""

    user: UserAccount
    login: LoginSession


def device_of(user_agent: str) -> str:
    """A browser in words: "Firefox on Linux". Only these words are kept, never the whole header."""
    browser = next((name for sign, name in BROWSERS if f"{sign}/" in user_agent), "")
    system = next((name for sign, name in SYSTEMS if sign in user_agent), "")
    if browser:
        return f"{browser} on {system}" if system else browser
    program = re.match(r"[A-Za-z][\w.-]{0,30}", user_agent)
    return program.group() if program else "an unknown device"


def seen(session: Session, login: LoginSession) -> None:
    """Note that a session is in use, once a minute; a request that finds the row busy leaves it to the other."""
    now = datetime.now(UTC)
    if login.last_seen_at is not None and login.last_seen_at > now - SEEN_EVERY:
        return
    free = select(LoginSession.id).where(LoginSession.id == login.id).with_for_update(skip_locked=True)
    session.execute(update(LoginSession).where(LoginSession.id.in_(free)).values(last_seen_at=now))


def of_user(session: Session, user_id: UUID) -> Sequence[LoginSession]:
    """The sessions that still work, the last used first."""
    query = select(LoginSession).where(
        LoginSession.user_id == user_id, LoginSession.revoked_at.is_(None), LoginSession.expires_at > func.now()
    )
    last = func.coalesce(LoginSession.last_seen_at, LoginSession.created_at)
    return session.scalars(query.order_by(last.desc(), LoginSession.id)).all()


def find(session: Session, session_id: UUID) -> LoginSession:
    """A session that still works. Raises NotFound."""
    found = session.scalar(
        select(LoginSession).where(
            LoginSession.id == session_id, LoginSession.revoked_at.is_(None), LoginSession.expires_at > func.now()
        )
    )
    if found is None:
        raise NotFound("there is no such session; it may have ended already")
    return found


def end(session: Session, actor: str, login: LoginSession) -> None:
    """End a session: its next request is nobody's."""
    login.revoked_at = datetime.now(UTC)
    session.flush()
    audit.record(session, actor, "session.end", f"user:{login.user_id}", {"session": str(login.id)})


def end_all(session: Session, actor: str, user_id: UUID, *, but: UUID | None = None) -> int:
    """End every session of a person, except the one they are using; how many that were."""
    ended = [login for login in of_user(session, user_id) if login.id != but]
    for login in ended:
        login.revoked_at = datetime.now(UTC)
    session.flush()
    if ended:
        audit.record(session, actor, "session.end_all", f"user:{user_id}", {"sessions": len(ended)})
    return len(ended)
