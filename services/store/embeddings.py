"""Vectors of a project's newest live answers, for search by meaning: which are due, keeping them, letting them go."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.store.copying import among
from services.store.models import Interaction, InteractionBody, InteractionEmbedding, Project
from services.store.pages import first_id

KEPT = 100_000
# What is read of a prompt and of an answer: more says little about what it is about.
CHARACTERS = 1500
ANSWERED = ("stop", "length")


class Due(NamedTuple):
    """An answer without a vector of this model, as the text to embed."""

    id: UUID
    text: str


def kept(project: Project) -> int:
    """How many vectors a project keeps; 0 when it wants none."""
    return int(project.config.get("embeddings_kept", KEPT))


def due(session: Session, project_id: UUID, model: str, keep: int, *, limit: int) -> list[Due]:
    """The newest answers among the newest `keep` that have no vector of this model."""
    live = (
        Interaction.project_id == project_id,
        Interaction.origin == "live",
        Interaction.finish_reason.in_(ANSWERED),
    )
    floor = session.scalar(select(Interaction.id).where(*live).order_by(Interaction.id.desc()).offset(keep).limit(1))
    have = select(InteractionEmbedding.id).where(
        InteractionEmbedding.id == Interaction.id, InteractionEmbedding.model == model
    )
    query = (
        select(Interaction.id, InteractionBody.messages, func.left(InteractionBody.output, CHARACTERS))
        .join(InteractionBody, InteractionBody.id == Interaction.id)
        .where(*live, ~have.correlate(Interaction).exists())
    )
    if floor is not None:
        query = query.where(Interaction.id > floor)
    rows = session.execute(query.order_by(Interaction.id.desc()).limit(limit))
    return [Due(one, text_of(messages, output)) for one, messages, output in rows]


def newest(session: Session, project_id: UUID) -> UUID | None:
    """The newest answer of a project that has a vector, of whatever model."""
    query = select(InteractionEmbedding.id).where(InteractionEmbedding.project_id == project_id)
    return session.scalar(query.order_by(InteractionEmbedding.id.desc()).limit(1))


def behind(session: Session, project_id: UUID, known: UUID | None, until: datetime) -> bool:
    """Whether an answer given before `until` is newer than `known`. Late rows come with the next newer one."""
    live = select(Interaction.id).where(
        Interaction.project_id == project_id, Interaction.origin == "live", Interaction.finish_reason.in_(ANSWERED)
    )
    if known is not None:
        live = live.where(Interaction.id > known)
    return session.scalar(live.where(Interaction.id < first_id(until)).limit(1)) is not None


def text_of(messages: Sequence[Any], output: str) -> str:
    """What was asked last, and the answer. Messages are an app's own JSON: anything may stand in them."""
    asked = [
        message["content"]
        for message in messages
        if isinstance(message, dict) and message.get("role") != "system" and isinstance(message.get("content"), str)
    ]
    return f"{asked[-1][:CHARACTERS] if asked else ''}\n{output[:CHARACTERS]}".strip()


class Known(NamedTuple):
    """Vectors of one model, each of length 1: a row of `vectors` [N, D] for each of `ids`."""

    model: str
    ids: list[UUID]
    vectors: NDArray[np.float32]


def known(session: Session, ids: Sequence[UUID], model: str | None = None) -> Known | None:
    """The vectors there are of these answers: of the model named, else of the one that most of them have."""
    rows = session.execute(
        select(InteractionEmbedding.id, InteractionEmbedding.model, InteractionEmbedding.vector).where(
            among(InteractionEmbedding.id, ids)
        )
    ).all()
    models = Counter(row.model for row in rows)
    if model is None and models:
        model = models.most_common(1)[0][0]
    mine = [row for row in rows if row.model == model]
    if model is None or not mine:
        return None
    vectors = np.array([row.vector for row in mine], dtype=np.float32)
    return Known(model, [row.id for row in mine], vectors)


def add(session: Session, project_id: UUID, model: str, vectors: Mapping[UUID, Sequence[float]]) -> None:
    """Keep these vectors in place of any others of the same answers; none of an answer that is gone meanwhile."""
    there = set(session.scalars(select(Interaction.id).where(Interaction.id.in_(vectors))))
    rows = [
        {"id": one, "project_id": project_id, "model": model, "vector": vector}
        for one, vector in vectors.items()
        if one in there
    ]
    if not rows:
        return
    fresh = insert(InteractionEmbedding).values(rows)
    replaced = {"model": fresh.excluded.model, "vector": fresh.excluded.vector}
    session.execute(fresh.on_conflict_do_update(index_elements=["id"], set_=replaced))


def prune(session: Session, project_id: UUID, model: str, keep: int) -> None:
    """Let go of other models' vectors, of those beyond the newest `keep`, and of answers past their retention."""
    own = InteractionEmbedding.project_id == project_id
    beyond = session.scalar(
        select(InteractionEmbedding.id).where(own).order_by(InteractionEmbedding.id.desc()).offset(keep).limit(1)
    )
    oldest = session.scalar(select(InteractionBody.id).order_by(InteractionBody.id).limit(1))
    gone = [InteractionEmbedding.model != model]
    if beyond is not None:
        gone.append(InteractionEmbedding.id <= beyond)
    if oldest is not None:
        gone.append(InteractionEmbedding.id < oldest)
    session.execute(delete(InteractionEmbedding).where(own, or_(*gone)))
