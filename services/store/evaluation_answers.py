"""Answers kept between evaluations: what the same weights said to the same request about an example, whenever asked."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.store.copying import among
from services.store.models import EvaluationAnswer


class Key(NamedTuple):
    """Which request about which example; the weights are those of the whole batch."""

    example_id: UUID
    request_hash: str


class Answer(NamedTuple):
    """What came back. `finish_reason` is stop, length or error; `likelihood` in [0, 1] where a text was scored."""

    output: str
    finish_reason: str
    tokens: int
    likelihood: float | None = None


def known(session: Session, weights: str, keys: Sequence[Key]) -> dict[Key, Answer]:
    """The answers there are already."""
    wanted = select(EvaluationAnswer).where(
        EvaluationAnswer.weights == weights,
        among(EvaluationAnswer.example_id, list({key.example_id for key in keys})),
    )
    found = {
        Key(row.example_id, row.request_hash): Answer(row.output, row.finish_reason, row.tokens, row.likelihood)
        for row in session.scalars(wanted)
    }
    return {key: found[key] for key in keys if key in found}


def keep(session: Session, project_id: UUID, weights: str, answers: Iterable[tuple[Key, Answer]]) -> None:
    """Store answers; one that another attempt stored meanwhile is left as it is."""
    rows: list[dict[str, Any]] = [
        {"project_id": project_id, "weights": weights, **key._asdict(), **answer._asdict()} for key, answer in answers
    ]
    if rows:
        session.execute(insert(EvaluationAnswer).on_conflict_do_nothing(), rows)


def forget(session: Session, project_id: UUID, *, except_of: Sequence[str]) -> None:
    """Drop the project's answers of other weights: what served once is an incumbent no more."""
    session.execute(
        delete(EvaluationAnswer).where(
            EvaluationAnswer.project_id == project_id, EvaluationAnswer.weights.not_in(except_of)
        )
    )
