"""Hidden gold items: settled items shown again to reviewers who have not seen them, to learn how often they are right.

A judgement of one is stored with `checked` and counts for nothing else: not towards overlap, examples or estimates.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from math import sqrt
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store.models import Annotation, Project, ReviewItem, UserAccount
from services.store.reviews_standing import COUNTED, agree, said, said_by, standing_annotations, touched_by, unrevoked

DEFAULT_SHARE = 0.05
MOST_ANSWERS = 20_000
Z95 = 1.959964


class GoldAccuracy(NamedTuple):
    """A reviewer's answers to hidden gold items: how many, how many right, and the share's 95 % interval (Wilson)."""

    user_id: UUID
    name: str
    answered: int
    right: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Of the answers, those that were right."""
        return self.right / self.answered


def share(project: Project) -> float:
    """Which part of a reviewer's stream the project wants to be gold."""
    return float(project.config.get("gold_share", DEFAULT_SHARE))


def is_check(item: ReviewItem) -> bool:
    """Whether a judgement of the item now answers a hidden check. `settle` clears gold whenever an item reopens."""
    return item.state == "done" and item.gold is not None


def unseen(project_id: UUID, user_id: UUID) -> Select[ReviewItem]:
    """Gold items nobody holds and this person has never judged, in an order of their own for each person."""
    return (
        select(ReviewItem)
        .where(
            ReviewItem.project_id == project_id,
            ReviewItem.gold.is_not(None),
            ReviewItem.state == "done",
            or_(ReviewItem.lease_expires_at.is_(None), ReviewItem.lease_expires_at <= func.now()),
            ~touched_by(user_id),
        )
        .order_by(func.hashtextextended(func.concat(ReviewItem.id, str(user_id)), 0))
    )


def held(user_id: UUID) -> ColumnElement[bool]:
    """True for items whose hidden check lies with this person."""
    return (ReviewItem.state == "done") & ReviewItem.gold.is_not(None) & (ReviewItem.lease_user_id == user_id)


def mark(session: Session, item: ReviewItem, by: UUID) -> None:
    """Make a settled item gold. The item must be locked. Raises Conflict when nothing certain is known of it."""
    known = _known(session, item)
    item.gold = {
        "verdict": known.verdict, "correction": known.correction, "preference": known.preference,
        "annotation_id": str(known.id), "by": str(by),
    }  # fmt: skip
    session.flush()


def _known(session: Session, item: ReviewItem) -> Annotation:
    spoken = [one for one in standing_annotations(session, item.id) if one.verdict in COUNTED]
    if item.state == "done":
        decided = [one for one in spoken if one.adjudicates and not one.again]
        if decided:
            return decided[-1]
        if len({one.author_id for one in spoken}) > 1 and agree(spoken):
            return spoken[0]
    raise Conflict(
        "only an item that a lead who was none of its judges decided, or on which two reviewers agree, can be gold"
    )


def unmark(session: Session, item: ReviewItem) -> None:
    """Show it to nobody any more. Answers given stay, and stay uncounted. The item must be locked."""
    item.gold = None
    session.flush()


def right(gold: dict[str, Any], answer: Annotation) -> bool:
    """Whether an answer says what is known. Corrections may differ in the layout of their JSON, not in words."""
    verdict, correction, preference = said_by(answer)
    known = said(gold["verdict"], gold.get("correction"), gold.get("preference"))
    return (verdict, _laid_out(correction), preference) == (known[0], _laid_out(known[1]), known[2])


def _laid_out(text: str) -> str:
    if text[:1] not in ("{", "["):
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def accuracy(session: Session, project_id: UUID) -> list[GoldAccuracy]:
    """Every reviewer who answered gold items of a project, by name, over the latest MOST_ANSWERS answers.

    Skipped and escalated ones, and those of items no longer gold, are neither right nor wrong.
    """
    latest = (
        select(UserAccount.id, UserAccount.name, ReviewItem.gold, Annotation)
        .join(UserAccount, UserAccount.id == Annotation.author_id)
        .join(ReviewItem, ReviewItem.id == Annotation.review_item_id)
        .where(
            Annotation.project_id == project_id, Annotation.checked, Annotation.verdict.in_(COUNTED),
            ReviewItem.gold.is_not(None), unrevoked(),
        )
        .order_by(Annotation.created_at.desc())
        .limit(MOST_ANSWERS)
    )  # fmt: skip
    answers = sorted(
        ((name, user_id, right(gold, answer)) for user_id, name, gold, answer in session.execute(latest)),
        key=lambda one: (one[0], str(one[1])),
    )
    return [_of_one(user_id, name, [one[2] for one in mine]) for (name, user_id), mine in _by_person(answers)]


def _by_person(answers: Iterable[tuple[str, UUID, bool]]) -> Iterable[tuple[tuple[str, UUID], list[Any]]]:
    return [(person, list(mine)) for person, mine in groupby(answers, key=lambda one: (one[0], one[1]))]


def _of_one(user_id: UUID, name: str, answers: list[bool]) -> GoldAccuracy:
    low, high = wilson(sum(answers), len(answers))
    return GoldAccuracy(user_id, name, len(answers), sum(answers), low, high)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), honest for few trials too."""
    if not trials:
        return 0.0, 1.0
    rate, square = successes / trials, Z95 * Z95
    middle = (rate + square / (2 * trials)) / (1 + square / trials)
    spread = Z95 * sqrt(rate * (1 - rate) / trials + square / (4 * trials * trials)) / (1 + square / trials)
    return max(0.0, middle - spread), min(1.0, middle + spread)
