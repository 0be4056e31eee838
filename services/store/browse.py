"""The lines of the interactions list, and what one interaction's page shows besides the log."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Text, and_, cast, func, select, text
from sqlalchemy.orm import Session

from services.store.models import Annotation, Feedback, Interaction, InteractionBody, ReviewItem, UserAccount
from services.store.reviews import standing

# Where an excerpt is cut from: words are shown where they stand.
EXCERPT_FROM = 4000


class Line(NamedTuple):
    """One row of the list."""

    id: UUID
    started_at: datetime
    origin: str
    adapter_digest: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float | None
    mean_logprob: float | None
    prompt: str | None
    output: str | None
    worst_rating: int | None
    ratings: int


def lines(session: Session, project_id: UUID, ids: Sequence[UUID]) -> list[Line]:
    """These interactions of a project, in the order given."""
    opinion = (
        select(func.min(func.coalesce(Feedback.rating, 0)).label("worst"), func.count().label("ratings"))
        .where(Feedback.interaction_id == Interaction.id, Feedback.project_id == project_id)
        .correlate(Interaction)
        .lateral("opinion")
    )
    query = (
        select(
            Interaction.id, Interaction.started_at, Interaction.origin, Interaction.adapter_digest,
            Interaction.finish_reason, Interaction.prompt_tokens, Interaction.completion_tokens,
            Interaction.latency_ms, Interaction.mean_logprob,
            func.left(InteractionBody.messages[-1]["content"].as_string(), EXCERPT_FROM),
            func.left(InteractionBody.output, EXCERPT_FROM),
            opinion.c.worst, opinion.c.ratings,
        )
        .outerjoin(InteractionBody, and_(InteractionBody.id == Interaction.id, InteractionBody.id.in_(ids)))
        .join(opinion, text("true"))
        .where(Interaction.project_id == project_id, Interaction.id.in_(ids))
    )  # fmt: skip
    found = {row[0]: Line(*row) for row in session.execute(query)} if ids else {}
    return [found[one] for one in ids if one in found]


def digests(session: Session, project_id: UUID) -> list[str | None]:
    """The weights that answered in the last thousand interactions, newest first; None is the base."""
    recent = (
        select(Interaction.id, Interaction.adapter_digest)
        .where(Interaction.project_id == project_id)
        .order_by(Interaction.id.desc())
        .limit(1000)
        .subquery()
    )
    grouped = select(recent.c.adapter_digest).group_by(recent.c.adapter_digest)
    return list(session.scalars(grouped.order_by(func.max(cast(recent.c.id, Text)).desc())))


class Judged(NamedTuple):
    """An annotation, who made it, and whether it still stands."""

    annotation: Annotation
    author: str
    stands: bool


def judgements(session: Session, interaction_id: UUID) -> list[Judged]:
    """Everything people did with an interaction, undone judgements included, oldest first."""
    rows = session.execute(
        select(Annotation, UserAccount.name, and_(standing()))
        .join(UserAccount, UserAccount.id == Annotation.author_id)
        .where(Annotation.interaction_id == interaction_id, ~Annotation.checked)
        .order_by(Annotation.id)
    )
    return [Judged(*row) for row in rows]


def review_item(session: Session, interaction_id: UUID) -> ReviewItem | None:
    """The place of an interaction in the review queue, if it was chosen."""
    return session.scalar(select(ReviewItem).where(ReviewItem.interaction_id == interaction_id))
