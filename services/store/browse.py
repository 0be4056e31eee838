"""The interactions list: filters that live in the URL, pages by the last id seen, excerpts only."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Text, and_, cast, func, or_, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from services.errors import Unavailable
from services.store.models import Annotation, Feedback, Interaction, InteractionBody, ReviewItem, UserAccount
from services.store.pages import first_id
from services.store.reviews import standing

WINDOWS = {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(days=7), "all": None}
FEEDBACK = ("negative", "positive", "any", "none")
EXCERPT = 240
SEARCH_MILLISECONDS = 4000


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the list is narrowed to; empty strings leave a field alone. `digest` "base" is the base model."""

    words: str = ""
    digest: str = ""
    finish: str = ""
    feedback: str = ""
    window: str = "all"
    origin: str = ""


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


def lines(
    session: Session, project_id: UUID, search: Search, *, before: UUID | None = None, limit: int = 50
) -> list[Line]:
    """Newest first, older than `before`. A search that takes too long says so instead of holding the database."""
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
            func.left(InteractionBody.messages[-1]["content"].as_string(), EXCERPT),
            func.left(InteractionBody.output, EXCERPT),
            opinion.c.worst, opinion.c.ratings,
        )
        .outerjoin(InteractionBody, InteractionBody.id == Interaction.id)
        .join(opinion, text("true"))
        .where(Interaction.project_id == project_id, *_conditions(search, project_id))
        .order_by(Interaction.id.desc())
        .limit(limit)
    )  # fmt: skip
    if before is not None:
        query = query.where(Interaction.id < before)
    session.execute(text(f"SET LOCAL statement_timeout = {SEARCH_MILLISECONDS}"))
    try:
        found = [Line(*row) for row in session.execute(query)]
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", "") != "57014":
            raise
        raise Unavailable("this search takes too long; choose a shorter time window", code="search_timeout") from error
    session.execute(text("SET LOCAL statement_timeout = DEFAULT"))
    return found


def _conditions(search: Search, project_id: UUID) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    span = WINDOWS.get(search.window)
    if span is not None:
        start = first_id(datetime.now(UTC) - span)
        conditions += [Interaction.id >= start, or_(InteractionBody.id.is_(None), InteractionBody.id >= start)]
    if search.words:
        pattern = f"%{_literal(search.words)}%"
        matching = or_(InteractionBody.output.ilike(pattern), cast(InteractionBody.messages, Text).ilike(pattern))
        conditions.append(matching)
    if search.digest:
        served = Interaction.adapter_digest
        conditions.append(served.is_(None) if search.digest == "base" else served.startswith(search.digest))
    if search.finish:
        conditions.append(Interaction.finish_reason == search.finish)
    if search.origin:
        conditions.append(Interaction.origin == search.origin)
    if search.feedback:
        conditions.append(_opinion(search.feedback, project_id))
    return conditions


def _literal(words: str) -> str:
    """Typed words, not a LIKE pattern."""
    return words.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")


def _opinion(kind: str, project_id: UUID) -> ColumnElement[bool]:
    said = select(Feedback.id).where(Feedback.interaction_id == Interaction.id, Feedback.project_id == project_id)
    if kind == "negative":
        said = said.where(or_(Feedback.rating < 0, Feedback.correction.is_not(None)))
    elif kind == "positive":
        said = said.where(Feedback.rating > 0)
    present = said.correlate(Interaction).exists()
    return ~present if kind == "none" else present


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
