"""Worked examples: corrections of the train split that the gateway places in the prompts of questions like theirs.

A judgement rings for the job that makes their vectors; one that is taken back removes them in its own transaction. A
vector is of the user's turn alone, mean-pooled by the base model without an adapter, so that swaps change none of them.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import jobs
from services.store.instant_config import read_worked
from services.store.models import Annotation, Example, ExampleEmbedding, Interaction, Job, Project, ReviewItem

JOB = "examples.embed"
# Longer turns are no examples: they would fill the prompt.
LONGEST_TEXT = 8000
MOST_READ_TOKENS = 512
# What a gateway holds of a project, the newest.
MOST_EXAMPLES = 2000
RETRY = timedelta(minutes=1)


class Encoder(Protocol):
    """As much of a tokenizer as this needs."""

    def encode_plain(self, text: str) -> list[int]: ...


class Count(NamedTuple):
    """For the page: corrections that can be placed, and when the newest became so."""

    examples: int
    newest: datetime | None


def read_tokens(tokenizer: Encoder, text: str) -> list[int]:
    """What is pooled for a user's turn: the same for a correction and for a question."""
    return tokenizer.encode_plain(text[:LONGEST_TEXT])[:MOST_READ_TOKENS]


def question_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The turn that is asked about: the last one, if it is the user's text."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    return content if last.get("role") == "user" and isinstance(content, str) and content.strip() else None


def shown_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The user's turn of an example that can be placed: one question, with nothing but system text before it."""
    turns = [message for message in messages if message.get("role") != "system"]
    question = question_of(messages)
    return question if len(turns) == 1 and question is not None and len(question) <= LONGEST_TEXT else None


def follow(session: Session, item: ReviewItem) -> None:
    """An item's judgements have changed: what it taught before is placed no more, and the job is rung for.

    Where worked examples are switched off, too: who switches them on again must not place what was taken back.
    """
    if item.split != "train":
        return
    session.execute(delete(ExampleEmbedding).where(ExampleEmbedding.example_id.in_(_of_interaction(item))))
    if read_worked(session.get_one(Project, item.project_id).config).enabled:
        ring(session, item.project_id)


def _of_interaction(item: ReviewItem) -> Any:  # noqa: ANN401 - a subquery
    return select(Example.id).where(
        Example.project_id == item.project_id, Example.interaction_id == item.interaction_id
    )


def ring(session: Session, project_id: UUID) -> bool:
    """Queue the job unless it is queued or runs; the dispatcher looks again for what a running one has missed."""
    payload = {"project_id": str(project_id)}
    try:
        jobs.enqueue(session, JOB, payload, project_id=project_id, dedupe_key=f"{JOB}:{project_id}", priority=10)
    except Conflict:
        return False
    return True


def ring_where_due(session: Session, now: datetime) -> list[UUID]:
    """Queue the job of every project that allows it and was judged, or got another base model, since its last one."""
    rung = []
    for project in session.scalars(select(Project)):
        if read_worked(project.config).enabled and _due(session, project.id, now) and ring(session, project.id):
            rung.append(project.id)
    return rung


def _due(session: Session, project_id: UUID, now: datetime) -> bool:
    last = session.scalar(select(func.max(Job.created_at)).where(Job.project_id == project_id, Job.kind == JOB))
    judged = session.scalar(select(func.max(Annotation.created_at)).where(Annotation.project_id == project_id))
    if judged is None:
        return False
    return last is None or judged > last or (now - last > RETRY and _other_base(session, project_id))


def _other_base(session: Session, project_id: UUID) -> bool:
    """Whether the model that answered last is another than the one the vectors are of."""
    newest = select(Interaction.base_digest).where(Interaction.project_id == project_id)
    base = session.scalar(newest.order_by(Interaction.id.desc()).limit(1))
    stale = select(ExampleEmbedding.example_id).where(
        ExampleEmbedding.project_id == project_id, ExampleEmbedding.base_digest != base
    )
    return base is not None and session.scalar(stale.limit(1)) is not None


def counted(session: Session, project_id: UUID) -> Count:
    """What can be placed now."""
    query = select(func.count(), func.max(ExampleEmbedding.created_at))
    row = session.execute(query.where(ExampleEmbedding.project_id == project_id)).one()
    return Count(int(row[0]), row[1])
