"""What heads may be trained on: live traffic of one project, as token ids of the tokenizer that serves now; and what
rendered the newest of it.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Integer, cast, or_, select
from sqlalchemy.orm import Session

from services.store.base import uuid7_time
from services.store.erasure_cover import is_erased
from services.store.models import Interaction, InteractionBody
from services.store.pages import first_id

# Sizes are read for so many of the newest answers; bodies only for those that are chosen.
MOST_ANSWERS = 100_000
PAGE = 500
COMPLETE = ("stop", "length")
# How far back the newest answer of a base is looked for.
MOST_NEWER = 1000


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


class Rendering(NamedTuple):
    """What rendered a prompt, as digests, and when it was served."""

    tokenizer: str
    template: str
    at: datetime


def newest_rendering(session: Session, project_id: UUID, *, base: str, since: datetime) -> Rendering | None:
    """Of the last live prompt that a base answered since a moment; None where nothing was served, or is kept, since."""
    newest = (
        select(Interaction.id, Interaction.base_digest)
        .where(Interaction.project_id == project_id, Interaction.origin == "live", Interaction.id >= first_id(since))
        .order_by(Interaction.id.desc())
        .limit(MOST_NEWER)
        .subquery()
    )
    found = session.execute(
        select(InteractionBody.id, InteractionBody.tokenizer_hash, InteractionBody.template_hash)
        .join(newest, newest.c.id == InteractionBody.id)
        .where(newest.c.base_digest == base)
        .order_by(InteractionBody.id.desc())
        .limit(1)
    ).one_or_none()
    return Rendering(found.tokenizer_hash, found.template_hash, uuid7_time(found.id)) if found else None


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
