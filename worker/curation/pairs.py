"""Which pairs are worth comparing: the two answers must differ in what they say, and the worse be recently served."""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store.models import Deployment, DeploymentEvent

PAIR_DAYS = 90
TYPO_CHARACTERS = 2
CHANGES = ("flip", "roll_back")
NOT_WORDS = re.compile(r"[\W_]+")


class Retired(NamedTuple):
    """Weights whose answers are no longer what this model says; None among the digests is the base."""

    digests: frozenset[str | None] = frozenset()


def retired_weights(session: Session, project_id: UUID, now: datetime, days: float = PAIR_DAYS) -> Retired:
    """Weights that last served a project longer than `days` ago."""
    deployment = session.get(Deployment, project_id)
    changes = session.execute(
        select(DeploymentEvent.from_digest, DeploymentEvent.at).where(
            DeploymentEvent.project_id == project_id, DeploymentEvent.kind.in_(CHANGES)
        )
    )
    return Retired(
        frozenset(_long_gone([(row.from_digest, row.at) for row in changes], now - timedelta(days=days)))
        - _serving(deployment)
    )


def _long_gone(left: Iterable[tuple[str | None, datetime]], since: datetime) -> set[str | None]:
    last: dict[str | None, datetime] = {}
    for digest, moment in left:
        last[digest] = max(moment, last.get(digest, moment))
    return {digest for digest, moment in last.items() if moment < since}


def _serving(deployment: Deployment | None) -> set[str | None]:
    return {deployment.active_digest, deployment.canary_digest} if deployment else {None}


def pair_flaw(better: str, worse: str, served_by: str | None, retired: Retired) -> str | None:
    """Why two answers make no pair, or None when they do."""
    if is_tiny(better, worse):
        return "the two answers hardly differ"
    if served_by in retired.digests:
        return "answered by weights long retired"
    return None


def is_tiny(one: str, other: str) -> bool:
    """Whether only case, blanks or punctuation differ, or a slip of the pen: two characters, digits excepted."""
    if _words(one) == _words(other):
        return bool(_words(one)) or one.strip() == other.strip()
    start = _common(one, other)
    end = _common(one[start:][::-1], other[start:][::-1])
    changed = one[start : len(one) - end] + other[start : len(other) - end]
    longest = max(len(one), len(other)) - start - end
    small = longest <= TYPO_CHARACTERS and not any(character.isdigit() for character in changed)
    # In a one-word label two characters are the whole difference between yes and no.
    return small and len(_words(one).split()) >= 8


def _words(text: str) -> str:
    return NOT_WORDS.sub(" ", text).casefold().strip()


def _common(one: str, other: str) -> int:
    """Length of the common beginning, by halving: both may be long."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
