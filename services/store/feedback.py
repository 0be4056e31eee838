"""Feedback: what apps and end users say about an interaction. It nominates for review and never trains alone."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound, Unprocessable
from services.store.base import uuid7, uuid7_time
from services.store.models import Feedback, Interaction

CLOCK_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What was said. `rating` is -1, 0 or 1; `score` is the app's own number, higher is better."""

    rating: int | None = None
    score: float | None = None
    comment: str | None = None
    correction: str | None = None
    author: str | None = None


class Stored(NamedTuple):
    """The row, and whether this call made it (False: it was a replay of an earlier one)."""

    row: Feedback
    created: bool


def add(session: Session, project_id: UUID, interaction_id: UUID, idempotency_key: str, opinion: Opinion) -> Stored:
    """Store an opinion once per idempotency key; the interaction may land later.

    Raises Unprocessable for an id that cannot be one of ours, NotFound when it landed in another project, Conflict
    when the key was used for something else.
    """
    check_id(interaction_id)
    owner = session.scalar(select(Interaction.project_id).where(Interaction.id == interaction_id))
    if owner is not None and owner != project_id:
        raise NotFound(f"this key's project has no interaction {interaction_id}")
    values = {**vars(opinion), "interaction_id": interaction_id}
    statement = insert(Feedback).values(id=uuid7(), project_id=project_id, idempotency_key=idempotency_key, **values)
    made = session.execute(
        statement.on_conflict_do_nothing(index_elements=["project_id", "idempotency_key"]).returning(Feedback.id)
    ).scalar_one_or_none()
    row = session.scalars(
        select(Feedback).where(Feedback.project_id == project_id, Feedback.idempotency_key == idempotency_key)
    ).one()
    if made is None and any(getattr(row, name) != value for name, value in values.items()):
        raise Conflict("this idempotency key was used for other feedback", code="idempotency_key_reused")
    return Stored(row, made is not None)


def check_id(interaction_id: UUID) -> None:
    """Refuse ids no gateway can have made: they would never land."""
    if interaction_id.version != 7 or uuid7_time(interaction_id) > datetime.now(UTC) + CLOCK_SKEW:
        raise Unprocessable(f"{interaction_id} is not the id of an interaction", param="interaction_id")


def of_interaction(session: Session, interaction_id: UUID) -> list[Feedback]:
    """Everything said about one interaction, oldest first."""
    return list(
        session.scalars(select(Feedback).where(Feedback.interaction_id == interaction_id).order_by(Feedback.id))
    )
