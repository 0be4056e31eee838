"""Which keys somebody reviews with: the usual ones, or their own, stored per person."""

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Unprocessable
from services.store.models import ReviewKeys

USUAL = {
    "accept": "a", "reject": "x", "edit": "e", "span": "s", "skip": "k", "escalate": "f", "left": "[", "right": "]",
    "tie": "=", "comment": "c", "undo": "u", "older": "ArrowLeft", "newer": "ArrowRight", "diff": "d", "tint": "p",
    "guidelines": "g", "help": "?",
}  # fmt: skip
NAMED = ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "PageUp", "PageDown", "Delete")


def of_person(session: Session, user_id: UUID) -> dict[str, str]:
    """Every action's key. What was stored for actions that no longer exist is passed over."""
    stored = session.get(ReviewKeys, user_id, populate_existing=True)
    chosen = stored.keys if stored is not None else {}
    return {action: str(chosen.get(action, usual)) for action, usual in USUAL.items()}


def choose(session: Session, user_id: UUID, keys: Mapping[str, str]) -> dict[str, str]:
    """Store the keys that differ from the usual ones; those not named return to usual. Answers every action's key.

    Raises Unprocessable for an unknown action, a key that cannot be one, and two actions on one key.
    """
    _check(keys)
    different = {action: key for action, key in keys.items() if USUAL[action] != key}
    row = insert(ReviewKeys).values(user_id=user_id, keys=different)
    session.execute(row.on_conflict_do_update(index_elements=["user_id"], set_={"keys": row.excluded["keys"]}))
    return of_person(session, user_id)


def _check(keys: Mapping[str, str]) -> None:
    unknown = sorted(set(keys) - set(USUAL))
    if unknown:
        raise Unprocessable(f"the review page has no action {', '.join(unknown)}", param="keys")
    taken: dict[str, str] = {}
    for action, key in (USUAL | dict(keys)).items():
        if not _possible(key):
            raise Unprocessable(
                f"{key[:20]!r} cannot be the key for {action}: digits, Enter, Escape, Tab and space are taken",
                param="keys",
            )
        if key in taken:
            raise Unprocessable(f"{key!r} would be both {taken[key]} and {action}", param="keys")
        taken[key] = action


def _possible(key: str) -> bool:
    """One visible character that is no digit, or a named key nothing else needs."""
    return key in NAMED or (len(key) == 1 and key.isprintable() and not key.isspace() and not key.isdigit())
