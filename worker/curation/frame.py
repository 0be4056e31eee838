"""The frame of one closed window: every interaction to be judged, and which strategies claim each.

Work is bounded: bodies of at most MOST_EXAMINED interactions are read, those that come first by their hash; what was
not looked at is the uniform audit's, so nothing is lost but a nomination.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from services.store import embeddings, schemas
from services.store.models import Feedback, Interaction, InteractionBody, ReviewItem
from services.store.sampling import STAMP
from worker.curation import novelty
from worker.curation.second import Second
from worker.curation.strata import Candidate, order_hash

REVIEWABLE = ("stop", "length")
MOST_EXAMINED = 5000
PAGE = 500
# Low confidence is below this quantile of the project's own recent answers, if there are enough of them.
LOW = 0.05
RECENT_ANSWERS = 2000
LEAST_RECENT = 200
RECENT_REVIEWED = 1000


class Window(NamedTuple):
    """[start, end) in time of the interaction's id."""

    start: datetime
    end: datetime

    @property
    def label(self) -> str:
        return f"{self.start.strftime(STAMP)}/{self.end.strftime(STAMP)}"


class Usual(NamedTuple):
    """Mean and minimum log-probability below which an answer of this project is unusually unsure."""

    mean: float
    least: float

    def unsure(self, mean: float | None, least: float | None) -> bool:
        return (mean is not None and mean < self.mean) or (least is not None and least < self.least)


def id_floor(moment: datetime) -> UUID:
    """The smallest id of that millisecond: UUIDv7 order is time order, and partitions are pruned by it."""
    return UUID(int=round(moment.timestamp() * 1000) << 80)


def reviewable(project_id: UUID) -> tuple[ColumnElement[bool], ...]:
    """Live answers that ended by themselves; errors and cancellations have nothing to judge."""
    return (
        Interaction.project_id == project_id,
        Interaction.origin == "live",
        Interaction.finish_reason.in_(REVIEWABLE),
    )


def in_window(project_id: UUID, window: Window) -> tuple[ColumnElement[bool], ...]:
    """Those of one window."""
    return (*reviewable(project_id), Interaction.id >= id_floor(window.start), Interaction.id < id_floor(window.end))


def frame(
    session: Session,
    project_id: UUID,
    window: Window,
    salt: str,
    *,
    response_schema: dict[str, Any] | None = None,
    seconds: Mapping[UUID, Second] | None = None,
) -> list[Candidate]:
    """Every candidate of the window with its claims."""
    disliked = select(Feedback.id).where(
        Feedback.interaction_id == Interaction.id,
        Feedback.project_id == project_id,
        or_(Feedback.rating < 0, Feedback.correction.is_not(None)),
    )
    rows = session.execute(
        select(
            Interaction.id, Interaction.group_key, disliked.exists(), Interaction.mean_logprob, Interaction.min_logprob
        ).where(*in_window(project_id, window))
    ).all()
    usual = usual_confidence(session, project_id, before=window.start)
    claims: dict[UUID, set[str]] = {row[0]: set() for row in rows}
    for interaction_id, _, negative, mean, least in rows:
        if negative:
            claims[interaction_id].add("negative_feedback")
        if usual is not None and usual.unsure(mean, least):
            claims[interaction_id].add("low_confidence")
        if seconds and interaction_id in seconds and seconds[interaction_id].differs:
            claims[interaction_id].add("disagreement")
    _examine(session, project_id, _first_by_hash(salt, claims), response_schema, claims)
    return [Candidate(row[0], row[1], frozenset(claims[row[0]])) for row in rows]


def usual_confidence(session: Session, project_id: UUID, *, before: datetime) -> Usual | None:
    """Of the project's last answers before a moment; None while there are too few to say what is usual."""
    recent = (
        select(Interaction.mean_logprob, Interaction.min_logprob)
        .where(*reviewable(project_id), Interaction.id < id_floor(before), Interaction.mean_logprob.is_not(None))
        .order_by(Interaction.id.desc())
        .limit(RECENT_ANSWERS)
        .subquery()
    )
    quantile = func.percentile_cont(LOW)
    count, mean, least = session.execute(
        select(func.count(), quantile.within_group(recent.c.mean_logprob), quantile.within_group(recent.c.min_logprob))
    ).one()
    return Usual(mean, least) if count >= LEAST_RECENT and mean is not None and least is not None else None


def _first_by_hash(salt: str, claims: Mapping[UUID, set[str]]) -> list[UUID]:
    """Those whose text is read. A complaint claims before all that a text could say."""
    open_ones = [one for one, claimed in claims.items() if "negative_feedback" not in claimed]
    if len(open_ones) <= MOST_EXAMINED:
        return open_ones
    return sorted(open_ones, key=lambda one: order_hash(salt, one))[:MOST_EXAMINED]


def _examine(
    session: Session, project_id: UUID, ids: Sequence[UUID], schema: dict[str, Any] | None, claims: dict[UUID, set[str]]
) -> None:
    """Add what the texts say: schema failures and novel prompts."""
    reviewed = _latest_reviewed(session, project_id)
    judged = _by_meaning(session, ids, reviewed, claims)
    known = _sketches(session, reviewed) if len(judged) < len(ids) else None
    sketches: dict[UUID, novelty.Sketches] = {}
    for body in _bodies(session, ids):
        wanted = schemas.schema_of(body.parameters, schema)
        if wanted is not None and schemas.fails(body.output, wanted):
            claims[body.id].add("schema_failure")
        if known is not None and body.id not in judged:
            sketches[body.id] = novelty.sketch(body.messages)
    if known is not None and sketches:
        _claim(list(sketches), novelty.novel(np.stack(list(sketches.values())), known), claims)


def _by_meaning(
    session: Session, ids: Sequence[UUID], reviewed: Sequence[UUID], claims: dict[UUID, set[str]]
) -> set[UUID]:
    """Claim what is far from the reviewed ones by the engine's vectors; returns those that have one to judge by."""
    near = embeddings.known(session, reviewed) if len(reviewed) >= novelty.LEAST_REVIEWED else None
    if near is None or len(near.ids) < novelty.LEAST_REVIEWED:
        return set()
    mine = embeddings.known(session, ids, near.model)
    if mine is None:
        return set()
    _claim(mine.ids, novelty.novel_by_meaning(mine.vectors, near.vectors), claims)
    return set(mine.ids)


def _claim(ids: Sequence[UUID], far: NDArray[np.bool_], claims: dict[UUID, set[str]]) -> None:
    for one, novel in zip(ids, far, strict=True):
        if novel:
            claims[one].add("novelty")


class Body(NamedTuple):
    """What is read of a text, and no longer than needed."""

    id: UUID
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    output: str


def _bodies(session: Session, ids: Sequence[UUID]) -> Iterator[Body]:
    columns = (InteractionBody.id, InteractionBody.messages, InteractionBody.parameters, InteractionBody.output)
    for start in range(0, len(ids), PAGE):
        for row in session.execute(select(*columns).where(InteractionBody.id.in_(ids[start : start + PAGE]))):
            yield Body(*row)


def _latest_reviewed(session: Session, project_id: UUID) -> Sequence[UUID]:
    latest = (
        select(ReviewItem.interaction_id)
        .where(ReviewItem.project_id == project_id, ReviewItem.done_at.is_not(None))
        .order_by(ReviewItem.done_at.desc())
        .limit(RECENT_REVIEWED)
    )
    return session.scalars(latest).all()


def _sketches(session: Session, reviewed: Sequence[UUID]) -> novelty.Sketches | None:
    """Of the reviewed prompts; None while there are too few to be far from."""
    if len(reviewed) < novelty.LEAST_REVIEWED:
        return None
    sketches = [novelty.sketch(body.messages) for body in _bodies(session, reviewed)]
    return np.stack(sketches) if len(sketches) >= novelty.LEAST_REVIEWED else None
