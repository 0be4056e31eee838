"""What heads may be trained on: live traffic of one project, as token ids of the tokenizer that serves now."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Integer, cast, or_, select
from sqlalchemy.orm import Session

from services.store.erasure_cover import is_erased
from services.store.models import Interaction, InteractionBody

# Sizes are read for so many of the newest answers; bodies only for those that are chosen.
MOST_ANSWERS = 100_000
PAGE = 500
COMPLETE = ("stop", "length")


class Size(NamedTuple):
    """One logged answer: what it takes to read it, and whose weights gave it."""

    id: UUID
    tokens: int
    adapter: str | None


class Answer(NamedTuple):
    """One logged answer as token ids, with the effective sampling parameters."""

    id: UUID
    prompt: list[int]
    answer: list[int]
    parameters: dict[str, Any]
    group: str


def sizes(session: Session, project_id: UUID, *, tokenizer: str, template: str, base: str) -> list[Size]:
    """Complete live answers of a project under these hashes and this base, oldest first.

    Left out: what another base said, answers beside others to one prompt (their noise is not known from the log), and
    whoever asked to be erased.
    """
    query = (
        select(Interaction.id, Interaction.prompt_tokens, Interaction.completion_tokens, Interaction.adapter_digest)
        .join(InteractionBody, InteractionBody.id == Interaction.id)
        .where(
            Interaction.project_id == project_id,
            Interaction.origin == "live",
            Interaction.base_digest == base,
            Interaction.finish_reason.in_(COMPLETE),
            Interaction.completion_tokens > 1,
            InteractionBody.tokenizer_hash == tokenizer,
            InteractionBody.template_hash == template,
            or_(InteractionBody.parameters["n"].is_(None), cast(InteractionBody.parameters["n"].astext, Integer) == 1),
            ~is_erased(project_id),
        )
        .order_by(Interaction.id.desc())
        .limit(MOST_ANSWERS)
    )
    rows = session.execute(query).all()
    return [Size(row.id, row.prompt_tokens + row.completion_tokens, row.adapter_digest) for row in reversed(rows)]


def answers(session: Session, project_id: UUID, ids: Sequence[UUID]) -> Iterator[Answer]:
    """Those of `ids` that the project has, in their order, a page at a time."""
    for start in range(0, len(ids), PAGE):
        page = ids[start : start + PAGE]
        query = (
            select(
                Interaction.id, Interaction.group_key, InteractionBody.prompt_token_ids, InteractionBody.token_ids,
                InteractionBody.parameters,
            )
            .join(InteractionBody, InteractionBody.id == Interaction.id)
            .where(Interaction.project_id == project_id, Interaction.id.in_(page))
        )  # fmt: skip
        found = {row.id: row for row in session.execute(query)}
        for row in (found[interaction_id] for interaction_id in page if interaction_id in found):
            yield Answer(row.id, row.prompt_token_ids, row.token_ids, row.parameters, row.group_key)
