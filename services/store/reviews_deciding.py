"""Who decides what reviewers could not agree on, or asked a lead about.

A lead who said nothing of the item, while there is one. Where every lead has spoken of it, as in a project with one
lead who also reviews, the item would wait for ever: then one of those who spoke may decide. The annotation says so
(`again`), pages show it, and what most of the judges said decides nothing all the same.
"""

from functools import cache
from uuid import UUID

from sqlalchemy import ColumnElement, or_, select, tuple_
from sqlalchemy.orm import aliased

from services.store.models import ROLES, Annotation, Membership, ReviewItem, UserAccount
from services.store.reviews_standing import COUNTED, standing, touched_by, unrevoked

FOR_LEADS = ("escalated", "disputed")
LEADS = ROLES[ROLES.index("lead") :]


def may_decide(user_id: UUID) -> ColumnElement[bool]:
    """True for items of the leads' queues that this lead may take."""
    return ~touched_by(user_id) | (~_other_lead_left(user_id) & ~_spoke_again(user_id) & ~_left_to_others(user_id))


def _other_lead_left(user_id: UUID) -> ColumnElement[bool]:
    """Whether somebody else leads here, can sign in, and has said nothing of the item."""
    spoken = select(Annotation.id).where(
        Annotation.review_item_id == ReviewItem.id, Annotation.author_id == Membership.user_id, unrevoked()
    )
    others = (
        select(Membership.id)
        .join(UserAccount, UserAccount.id == Membership.user_id)
        .where(
            or_(Membership.project_id.is_(None), Membership.project_id == ReviewItem.project_id),
            Membership.role.in_(LEADS), Membership.user_id != user_id,
            UserAccount.disabled_at.is_(None), UserAccount.deleted_at.is_(None),
            ~spoken.correlate(ReviewItem, Membership).exists(),
        )
    )  # fmt: skip
    return others.correlate(ReviewItem).exists()


def _spoke_again(user_id: UUID) -> ColumnElement[bool]:
    """Nobody speaks a third time."""
    mine = select(Annotation.id).where(
        Annotation.review_item_id == ReviewItem.id, Annotation.author_id == user_id, Annotation.again, unrevoked()
    )
    return mine.correlate(ReviewItem).exists()


@cache  # an alias costs milliseconds to make
def _later() -> type[Annotation]:
    return aliased(Annotation)


def _left_to_others(user_id: UUID) -> ColumnElement[bool]:
    """Whether they skipped it as it stands: a skip from before the dispute says nothing about the dispute."""
    later = _later()
    since = select(later.id).where(
        later.review_item_id == ReviewItem.id, later.author_id != user_id,
        later.verdict.in_((*COUNTED, "escalate")),
        tuple_(later.created_at, later.id) > tuple_(Annotation.created_at, Annotation.id),
    )  # fmt: skip
    skipped = select(Annotation.id).where(
        Annotation.review_item_id == ReviewItem.id, Annotation.author_id == user_id, Annotation.verdict == "skip",
        standing(), ~since.correlate(ReviewItem, Annotation).exists(),
    )  # fmt: skip
    return skipped.correlate(ReviewItem).exists()
