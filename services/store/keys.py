"""API keys: `wh_<8 character id>_<43 character secret>`, of which only an HMAC-SHA256 under the pepper is kept."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.settings import Settings
from services.store.models import ROLES, SCOPES, ApiKey

ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # no l, o, 0, 1: people read key ids aloud
PREFIX_LENGTH = 8
SECRET_LENGTH = 43
KEY_LENGTH = len("wh__") + PREFIX_LENGTH + SECRET_LENGTH
OVERLAP = timedelta(hours=24)
LONGEST_OVERLAP = timedelta(days=30)
TOUCH_EVERY = timedelta(minutes=1)
# What a person must hold to make a key with a scope: a key does no more than its maker may do by hand.
SCOPE_ROLES = {"infer": "lead", "feedback": "lead", "review": "reviewer", "train": "operator", "admin": "admin"}


def load_pepper(settings: Settings) -> bytes:
    """The key every stored hash depends on: WHET_SECRET, or the 0600 file `<home>/secret`, made at first use."""
    if settings.secret:
        return settings.secret.encode()
    path = settings.home / "secret"
    if not path.exists():
        _make_secret(path)
    if path.stat().st_mode & 0o077:
        raise PermissionError(f"{path} can be read by others: chmod 600 it, and rotate the keys if it may have leaked")
    pepper = path.read_bytes().strip()
    if len(pepper) < 32:
        raise ValueError(f"{path} is shorter than 32 characters; restore it, or delete it and make new keys")
    return pepper


def _make_secret(path: Path) -> None:
    """Several processes may start at once: the whole file appears by link, and the first one wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(32).encode())
        os.fsync(descriptor)
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        os.close(descriptor)
        draft.unlink()


def prefix_of(plaintext: str) -> str | None:
    """The public id inside a key, or None when it does not look like one of ours."""
    if len(plaintext) != KEY_LENGTH or not plaintext.isascii() or not plaintext.startswith("wh_"):
        return None
    prefix, separator = plaintext[3 : 3 + PREFIX_LENGTH], plaintext[3 + PREFIX_LENGTH]
    return prefix if separator == "_" else None


def digest(pepper: bytes, plaintext: str) -> bytes:
    """What is stored of a key."""
    return hmac.digest(pepper, plaintext.encode(), hashlib.sha256)


def matches(pepper: bytes, plaintext: str, stored: bytes) -> bool:
    """Whether the key is the one stored; takes the same time either way."""
    return hmac.compare_digest(digest(pepper, plaintext), stored)


def create(
    session: Session,
    *,
    pepper: bytes,
    name: str,
    scopes: Sequence[str],
    project_id: UUID | None = None,
    expires_at: datetime | None = None,
    user_id: UUID | None = None,
    created_by: UUID | None = None,
    rotated_from: UUID | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its plaintext, which is shown once and never stored. `project_id` None reaches every project.

    `user_id` is the person whom judgements made with the scope review belong to.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise InvalidRequest(f"scopes must be one or more of {', '.join(SCOPES)}, not {unknown or 'none'}")
    if not name.strip():
        raise InvalidRequest("a key needs a name, so that people know what to revoke", param="name")
    if len(name) > 200 or "\x00" in name:
        raise InvalidRequest("a name is at most 200 characters of text", param="name")
    prefix = "".join(secrets.choice(ALPHABET) for _ in range(PREFIX_LENGTH))
    plaintext = f"wh_{prefix}_{secrets.token_urlsafe(32)}"
    key = ApiKey(
        prefix=prefix,
        hash=digest(pepper, plaintext),
        name=name.strip(),
        project_id=project_id,
        scopes=sorted(set(scopes)),
        expires_at=expires_at,
        user_id=user_id,
        created_by=created_by,
        rotated_from=rotated_from,
    )
    session.add(key)
    session.flush()
    return key, plaintext


def rotate(
    session: Session, key_id: UUID, *, pepper: bytes, overlap: timedelta = OVERLAP, created_by: UUID | None = None
) -> tuple[ApiKey, str]:
    """A successor that may do the same, and its plaintext; both live until the old key expires after `overlap`.

    Raises Conflict for a key that is over, has a successor already, or (with an overlap) whose predecessor still
    works: never more than two live at once.
    """
    if not timedelta() <= overlap <= LONGEST_OVERLAP:
        raise InvalidRequest(f"the overlap is between nothing and {LONGEST_OVERLAP.days} days", param="overlap")
    old = session.get(ApiKey, key_id, with_for_update=True, populate_existing=True)
    if old is None:
        raise NotFound(f"there is no API key {key_id}")
    if not live(old):
        raise Conflict("this key is over; make a new one")
    predecessor = session.get(ApiKey, old.rotated_from) if old.rotated_from else None
    if overlap and predecessor is not None and live(predecessor):
        raise Conflict(f"its predecessor {predecessor.prefix} still works; revoke that, or end this one at once")
    successor = session.scalar(select(ApiKey.prefix).where(ApiKey.rotated_from == old.id))
    if successor is not None:
        raise Conflict(f"this key was rotated already; its successor is {successor}")
    now = datetime.now(UTC)
    ends = now + overlap
    lifetime = old.expires_at - old.created_at if old.expires_at else None
    made = create(
        session, pepper=pepper, name=old.name, scopes=old.scopes, project_id=old.project_id, user_id=old.user_id,
        expires_at=now + lifetime if lifetime else None, created_by=created_by, rotated_from=old.id,
    )  # fmt: skip
    old.expires_at = min(ends, old.expires_at or ends)
    session.flush()
    return made


def live(key: ApiKey) -> bool:
    """Whether a key still opens anything."""
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > datetime.now(UTC))


def stands(session: Session, key_id: UUID) -> bool:
    """Whether a key is live, or was rotated into one that is."""
    key = session.get(ApiKey, key_id)
    while key is not None and not live(key) and key.revoked_at is None:
        key = session.scalar(select(ApiKey).where(ApiKey.rotated_from == key.id))
    return key is not None and live(key)


def scopes_for(role: str | None) -> list[str]:
    """The scopes that somebody with this role may give to a key."""
    rank = ROLES.index(role) if role in ROLES else -1
    return [scope for scope, needed in SCOPE_ROLES.items() if ROLES.index(needed) <= rank]


def revoke(session: Session, key_id: UUID) -> ApiKey:
    """End a key now. Revoking twice keeps the first time."""
    key = session.get(ApiKey, key_id, with_for_update=True)
    if key is None:
        raise NotFound(f"there is no API key {key_id}")
    if key.revoked_at is None:
        key.revoked_at = func.now()
        session.flush()
        session.refresh(key)
    return key


def find(session: Session, pepper: bytes, plaintext: str) -> ApiKey | None:
    """The live key with this plaintext, or None when it is unknown, wrong, expired or revoked."""
    prefix = prefix_of(plaintext)
    if prefix is None:
        return None
    key = session.scalar(select(ApiKey).where(ApiKey.prefix == prefix))
    if key is None or not matches(pepper, plaintext, key.hash):
        return None
    return key if live(key) else None


def list_all(session: Session, project_id: UUID | None = None) -> list[ApiKey]:
    """Keys, newest first: those of one project, or with None all of them."""
    query = select(ApiKey).order_by(ApiKey.id.desc())
    if project_id is not None:
        query = query.where(ApiKey.project_id == project_id)
    return list(session.scalars(query))


def made_by(session: Session, user_id: UUID) -> list[ApiKey]:
    """The live keys that somebody made, newest first. Those that act as them are theirs and end with them."""
    query = select(ApiKey).where(ApiKey.created_by == user_id, ApiKey.user_id.is_distinct_from(user_id))
    return [key for key in session.scalars(query.order_by(ApiKey.id.desc())) if live(key)]


def touch(session: Session, used: Mapping[UUID, datetime]) -> None:
    """Note when keys were last used. Every call wakes the gateways' snapshots, so call it rarely."""
    for key_id, at in sorted(used.items()):
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=at))


def seen(session: Session, key: ApiKey) -> None:
    """Note that a key was used, once a minute. Whoever finds the row busy leaves it to the other."""
    now = datetime.now(UTC)
    if key.last_used_at is not None and key.last_used_at > now - TOUCH_EVERY:
        return
    free = select(ApiKey.id).where(ApiKey.id == key.id).with_for_update(skip_locked=True)
    session.execute(update(ApiKey).where(ApiKey.id.in_(free)).values(last_used_at=now))
