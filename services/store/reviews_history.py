"""Looking back: a person's last judgements, the judgements of a dispute, and what leads decided before."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store import interactions
from services.store.models import Annotation, InteractionBody, ReviewItem
from services.store.reviews_standing import COUNTED, standing, standing_annotations, unrevoked

LOOK_BACK = 20


class Looked(NamedTuple):
    """A judgement with its item."""

    annotation: Annotation
    item: ReviewItem


def of_person(session: Session, project_id: UUID, user_id: UUID, count: int = LOOK_BACK) -> list[Looked]:
    """The last judgements somebody made and did not take back, oldest first."""
    latest = (
        select(Annotation, ReviewItem)
        .join(ReviewItem, ReviewItem.id == Annotation.review_item_id)
        .where(Annotation.project_id == project_id, Annotation.author_id == user_id, unrevoked())
        .order_by(Annotation.created_at.desc(), Annotation.id.desc())
        .limit(count)
    )
    return [Looked(*row) for row in reversed(session.execute(latest).all())]


def of_dispute(session: Session, item_id: UUID) -> list[Annotation]:
    """What the judges of an item said, for whoever decides between them; oldest first."""
    spoken = standing_annotations(session, item_id)
    return [one for one in spoken if one.verdict in COUNTED and not one.adjudicates]


class Decided(NamedTuple):
    """An answer people disagreed about, and what a lead said of it."""

    body: InteractionBody
    decision: Annotation


def decided(session: Session, project_id: UUID, count: int = 3) -> list[Decided]:
    """The latest decisions of leads whose text is still logged. Held-out and gold items are shown to nobody."""
    latest = (
        select(Annotation)
        .join(ReviewItem, ReviewItem.id == Annotation.review_item_id)
        .where(
            Annotation.project_id == project_id, Annotation.adjudicates, standing(), ReviewItem.split == "train",
            ReviewItem.gold.is_(None), ReviewItem.state == "done", ReviewItem.alternative.is_(None),
        )
        .order_by(Annotation.created_at.desc())
        .limit(count)
    )  # fmt: skip
    found = list(session.scalars(latest))
    logged = interactions.get_many(session, [one.interaction_id for one in found])
    bodies = [(logged.get(one.interaction_id), one) for one in found]
    return [Decided(record.body, one) for record, one in bodies if record is not None and record.body is not None]
