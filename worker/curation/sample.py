"""Fills the review queue: samples every closed time window once, by the plan of `strata`.

A window is closed when its end, and a grace for answers still being written, have passed. What lands or is said
later moves nothing that was assigned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import case, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.settings import Settings
from services.store import reviews
from services.store.base import uuid7, uuid7_time
from services.store.jobs import JobFailed, Lease
from services.store.models import Annotation, Feedback, Interaction, Project, ReviewItem
from worker.curation.estimate import estimate_quality
from worker.curation.split import Chosen, assign
from worker.curation.strata import STAMP, Candidate, Placed, plan

REVIEWABLE = ("stop", "length")
LONGEST_GRACE_SECONDS = 60
ESTIMATED = timedelta(days=7)

log = structlog.get_logger()


@dataclass(frozen=True)
class Plan:
    """A project's sampling configuration. Raises ValueError for values that make no sense."""

    window_seconds: int
    grace_seconds: int
    budget: int
    uniform_share: float
    held_out_share: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Plan":
        window = int(config.get("window_seconds", 3600))
        plan = cls(
            window_seconds=window,
            grace_seconds=int(config.get("window_grace_seconds", min(window, LONGEST_GRACE_SECONDS))),
            budget=int(config.get("review_budget", 200)),
            uniform_share=max(0.2, float(config.get("uniform_share", 0.2))),
            held_out_share=float(config.get("held_out_share", 0.2)),
        )
        if plan.window_seconds < 1 or plan.grace_seconds < 0 or plan.budget < 1:
            raise ValueError("window_seconds and review_budget must be at least 1, window_grace_seconds 0")
        if not 0 <= plan.held_out_share < 1 or plan.uniform_share > 1:
            raise ValueError("held_out_share must be in [0, 1), uniform_share at most 1")
        return plan


class Window(NamedTuple):
    """[start, end) in time of the interaction's id."""

    start: datetime
    end: datetime

    @property
    def label(self) -> str:
        return f"{self.start.strftime(STAMP)}/{self.end.strftime(STAMP)}"


def sample_job(lease: Lease, settings: Settings) -> None:  # noqa: ARG001 - every handler has these two
    """Handler of "review.sample": every closed window not sampled yet, then the probabilities as realised."""
    project_id = UUID(lease.payload["project_id"])
    with lease.transaction() as session:
        try:
            added = sample(session, project_id)
        except (ValueError, NotFound) as error:
            raise JobFailed(f"cannot sample: {error}") from error
        realised(session, project_id)
        quality = estimate_quality(session, project_id, since=datetime.now(UTC) - ESTIMATED)
    log.info("sampled", project_id=str(project_id), items=added, quality=quality._asdict() if quality else None)


def sample(session: Session, project_id: UUID, *, now: datetime | None = None) -> int:
    """Add the items of every closed window that has none yet; returns how many. Running it again adds nothing."""
    # Two samplers would each see a window without items. FOR NO KEY UPDATE lets rows that refer to the project in.
    locked = select(Project).where(Project.id == project_id).with_for_update(key_share=True)
    project = session.scalar(locked.execution_options(populate_existing=True))
    if project is None:
        raise NotFound(f"no project {project_id}")
    chosen = Plan.of(project.config)
    added = 0
    for window in _closed_windows(session, project_id, chosen, now or datetime.now(UTC)):
        candidates = _frame(session, project_id, window)
        placed = plan(
            f"{project_id}/{window.label}", candidates, budget=chosen.budget, uniform_share=chosen.uniform_share
        )
        added += _insert(session, project_id, window, placed, chosen.held_out_share)
    return added


def _closed_windows(session: Session, project_id: UUID, chosen: Plan, now: datetime) -> Iterator[Window]:
    """Windows aligned to the clock, from the last sampled one on; stretches without traffic are skipped."""
    last = session.scalar(select(func.max(ReviewItem.window)).where(ReviewItem.project_id == project_id))
    resume = datetime.strptime(last.split("/")[1], STAMP).replace(tzinfo=UTC) if last else None
    closed_at = now - timedelta(seconds=chosen.grace_seconds)
    while True:
        first = _first_after(session, project_id, resume)
        if first is None:
            return
        index = int(first.timestamp()) // chosen.window_seconds
        start, end = (datetime.fromtimestamp(k * chosen.window_seconds, UTC) for k in (index, index + 1))
        if end > closed_at:
            return
        # After a change of window_seconds the last sampled window may reach into this one.
        yield Window(max(start, resume) if resume else start, end)
        resume = end


def _first_after(session: Session, project_id: UUID, start: datetime | None) -> datetime | None:
    wanted = select(Interaction.id).where(*_reviewable(project_id)).order_by(Interaction.id).limit(1)
    if start is not None:
        wanted = wanted.where(Interaction.id >= id_floor(start))
    first = session.scalar(wanted)
    return uuid7_time(first) if first is not None else None


def id_floor(moment: datetime) -> UUID:
    """The smallest id of that millisecond: UUIDv7 order is time order, and partitions are pruned by it."""
    return UUID(int=round(moment.timestamp() * 1000) << 80)


def _reviewable(project_id: UUID) -> tuple[Any, ...]:
    """Live answers that ended by themselves; errors and cancellations have nothing to judge."""
    return (
        Interaction.project_id == project_id,
        Interaction.origin == "live",
        Interaction.finish_reason.in_(REVIEWABLE),
    )


def _frame(session: Session, project_id: UUID, window: Window) -> list[Candidate]:
    disliked = select(Feedback.id).where(
        Feedback.interaction_id == Interaction.id,
        Feedback.project_id == project_id,
        or_(Feedback.rating < 0, Feedback.correction.is_not(None)),
    )
    rows = session.execute(
        select(Interaction.id, Interaction.group_key, disliked.exists()).where(
            *_reviewable(project_id), Interaction.id >= id_floor(window.start), Interaction.id < id_floor(window.end)
        )
    )
    return [Candidate(interaction_id, group_key, negative) for interaction_id, group_key, negative in rows]


def _insert(session: Session, project_id: UUID, window: Window, placed: list[Placed], held_out_share: float) -> int:
    if not placed:
        return 0
    chosen = [Chosen(item.candidate.interaction_id, item.candidate.group_key) for item in placed]
    sides = assign(session, project_id, chosen, held_out_share)
    rows = []
    for item in placed:
        split = sides[item.candidate.interaction_id]
        rows.append(
            {
                "id": uuid7(), "project_id": project_id, "interaction_id": item.candidate.interaction_id,
                "strategy": item.strategy, "window": window.label, "stratum_size": item.stratum_size,
                "priority": item.priority, "order_hash": item.order_hash, "split": split,
                "group_key": item.candidate.group_key, "overlap_target": 2 if split == "held_out" else 1,
                "state": "open",
            }
        )  # fmt: skip
    made = session.scalars(
        insert(ReviewItem).on_conflict_do_nothing(index_elements=["interaction_id"]).returning(ReviewItem.id), rows
    )
    return len(made.all())


def realised(session: Session, project_id: UUID) -> None:
    """Store π of every item: the labelled part of its stratum over the stratum's size."""
    judged = select(Annotation.id).where(
        Annotation.review_item_id == ReviewItem.id, Annotation.verdict.in_(reviews.COUNTED), reviews.standing()
    )
    labelled = (
        select(
            ReviewItem.window,
            ReviewItem.strategy,
            func.sum(case((judged.exists(), 1), else_=0)).label("labelled"),
        )
        .where(ReviewItem.project_id == project_id)
        .group_by(ReviewItem.window, ReviewItem.strategy)
        .subquery()
    )
    session.execute(
        update(ReviewItem)
        .where(
            ReviewItem.project_id == project_id,
            ReviewItem.window == labelled.c.window,
            ReviewItem.strategy == labelled.c.strategy,
        )
        .values(probability=labelled.c.labelled * 1.0 / ReviewItem.stratum_size)
        .execution_options(synchronize_session=False)
    )
