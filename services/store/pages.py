"""What the console's overview pages show: a project's loop in figures, the queue, what teaches what."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, and_, case, func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from services.store.models import (
    Annotation,
    Dataset,
    Deployment,
    DeploymentEvent,
    Evaluation,
    Example,
    Interaction,
    Project,
    ReviewItem,
    Revision,
    RevisionExample,
    Run,
)
from services.store.reviews import COUNTED, QUEUE_COUNTED_TO, standing

SPARK_HOURS = 24


class Card(NamedTuple):
    """A project on the home page. `waiting` stops counting at QUEUE_COUNTED_TO."""

    project: Project
    requests_hour: int
    waiting: int
    digest: str | None
    generation: int
    last_swap: datetime | None
    running: str | None


class Traffic(NamedTuple):
    """A project's last day: requests, those that failed, and requests an hour, oldest hour first."""

    requests: int
    failed: int
    hours: list[int]


class Loop(NamedTuple):
    """One turn of the loop in figures: served, reviewed, learned, live; `Traffic` has what was logged.

    `waiting` stops counting at QUEUE_COUNTED_TO.
    """

    served_hour: int
    waiting: int
    escalated: int
    reviewed: int
    learned: int
    revision_digest: str | None
    digest: str | None
    generation: int


class Worked(NamedTuple):
    """A judged example for the guidelines drawer."""

    messages: list[dict[str, object]]
    output: str | None
    completion: str | None


def first_id(moment: datetime) -> UUID:
    """The smallest UUIDv7 of a moment; comparing ids with it prunes partitions."""
    return UUID(int=int(moment.timestamp() * 1000) << 80 | 0x7 << 76 | 0x2 << 62)


def _since(moment: datetime) -> ColumnElement[bool]:
    return and_(Interaction.id >= first_id(moment), Interaction.origin == "live")


# --- home -------------------------------------------------------------------------------------------------


def cards(session: Session, projects: Sequence[Project]) -> list[Card]:
    """One card a project, in the order given."""
    ids = [project.id for project in projects]
    deployments = {
        row.project_id: row for row in session.scalars(select(Deployment).where(Deployment.project_id.in_(ids)))
    }
    swaps = dict(
        session.execute(
            select(DeploymentEvent.project_id, func.max(DeploymentEvent.at))
            .where(DeploymentEvent.project_id.in_(ids), DeploymentEvent.kind.in_(("flip", "roll_back")))
            .group_by(DeploymentEvent.project_id)
        ).all()
    )
    running = dict(
        session.execute(
            select(Run.project_id, Run.phase).where(Run.project_id.in_(ids), Run.state.in_(("queued", "running")))
        ).all()
    )
    return [
        Card(
            project=project,
            requests_hour=_served_hour(session, project.id),
            waiting=waiting(session, project.id),
            digest=deployments[project.id].active_digest if project.id in deployments else None,
            generation=deployments[project.id].generation if project.id in deployments else 1,
            last_swap=swaps.get(project.id),
            running=running.get(project.id),
        )
        for project in projects
    ]


def _ago(span: timedelta) -> datetime:
    return datetime.now(UTC) - span


def _served_hour(session: Session, project_id: UUID) -> int:
    query = select(func.count()).where(Interaction.project_id == project_id, _since(_ago(timedelta(hours=1))))
    return session.scalar(query) or 0


def traffic(session: Session, project_id: UUID) -> Traffic:
    """The last day, from every row of it: callers keep the answer for a while."""
    ago = func.floor(func.extract("epoch", func.now() - Interaction.started_at) / 3600)
    rows = session.execute(
        select(ago.label("ago"), func.count(), func.count().filter(Interaction.finish_reason == "error"))
        .where(Interaction.project_id == project_id, _since(_ago(timedelta(hours=SPARK_HOURS))))
        .group_by("ago")
    ).all()
    hours = [0] * SPARK_HOURS
    for hours_ago, requests, _ in rows:
        hours[min(max(SPARK_HOURS - 1 - int(hours_ago), 0), SPARK_HOURS - 1)] += requests
    return Traffic(sum(row[1] for row in rows), sum(row[2] for row in rows), hours)


# --- one project ------------------------------------------------------------------------------------------


def loop(session: Session, project_id: UUID, reviewed: int) -> Loop:
    """The figures under the loop strip; `reviewed` is what `judgements` counts."""
    escalated = select(func.count()).where(ReviewItem.project_id == project_id, ReviewItem.state == "escalated")
    revision = session.scalar(
        select(Revision)
        .join(Dataset, Dataset.id == Revision.dataset_id)
        .where(Dataset.project_id == project_id)
        .order_by(Revision.id.desc())
        .limit(1)
    )
    deployment = session.get(Deployment, project_id, populate_existing=True)
    return Loop(
        served_hour=_served_hour(session, project_id),
        waiting=waiting(session, project_id),
        escalated=session.scalar(escalated) or 0,
        reviewed=reviewed,
        learned=revision.train_count + revision.held_out_count if revision else 0,
        revision_digest=revision.digest if revision else None,
        digest=deployment.active_digest if deployment else None,
        generation=deployment.generation if deployment else 1,
    )


def judgements(session: Session, project_id: UUID) -> int:
    """How many counted judgements stand, from every one of them: callers keep the answer for a while."""
    standing_ones = select(func.count()).where(
        Annotation.project_id == project_id, Annotation.verdict.in_(COUNTED), standing()
    )
    return session.scalar(standing_ones) or 0


def waiting(session: Session, project_id: UUID) -> int:
    """Open items, counted up to QUEUE_COUNTED_TO: on every page, so its cost must not grow with the queue."""
    some = (
        select(ReviewItem.id)
        .where(ReviewItem.project_id == project_id, ReviewItem.state == "open")
        .limit(QUEUE_COUNTED_TO)
        .subquery()
    )
    return session.scalar(select(func.count()).select_from(some)) or 0


class Strategy(NamedTuple):
    """One line of the queue: how an item came to wait, how many do, and how many were finished."""

    strategy: str
    waiting: int
    done: int


def queue(session: Session, project_id: UUID) -> list[Strategy]:
    """The queue by sampling strategy, the longest first."""
    rows = session.execute(
        select(
            ReviewItem.strategy,
            func.count().filter(ReviewItem.state.in_(("open", "escalated"))),
            func.count().filter(ReviewItem.state == "done"),
        )
        .where(ReviewItem.project_id == project_id)
        .group_by(ReviewItem.strategy)
        .order_by(func.count().desc(), ReviewItem.strategy)
    )
    return [Strategy(*row) for row in rows]


def worked_examples(session: Session, project_id: UUID, count: int = 3) -> list[Worked]:
    """Corrected rows two people judged, or failing those any corrected rows; held-out and gold rows are never shown."""
    gold = select(ReviewItem.id).where(
        ReviewItem.interaction_id == Example.interaction_id, ReviewItem.gold.is_not(None)
    )
    query = (
        select(Example)
        .where(
            Example.project_id == project_id,
            Example.source == "corrected",
            Example.split == "train",
            ~gold.exists(),
            Example.completion.is_not(None),  # an erased one has no text left
        )
        .order_by(func.jsonb_array_length(Example.reviewers).desc(), Example.id)
        .limit(count)
    )
    return [Worked(row.messages, row.rejected, row.completion) for row in session.scalars(query)]


# --- runs and artefacts -----------------------------------------------------------------------------------


class RunLine(NamedTuple):
    """A run in the list with what its gate decided, and its score before and after when there is one."""

    run: Run
    decision: str | None
    summary: dict[str, Any] | None
    train_count: int | None
    held_out_count: int | None


def run_lines(
    session: Session, project_id: UUID, *, limit: int = 50, kind: str | None = None, states: Sequence[str] | None = None
) -> list[RunLine]:
    """Newest first; only of a kind, or in one of these states, when given."""
    chosen = [Run.kind == kind] if kind else []
    chosen += [Run.state.in_(states)] if states else []
    latest = (
        select(Evaluation.run_id, Evaluation.decision, Evaluation.summary)
        .where(Evaluation.project_id == project_id, Evaluation.decision != "undecided")
        .ext(distinct_on(Evaluation.run_id))
        .order_by(Evaluation.run_id, Evaluation.id.desc())
        .subquery()
    )
    rows = session.execute(
        select(Run, latest.c.decision, latest.c.summary, Revision.train_count, Revision.held_out_count)
        .outerjoin(latest, latest.c.run_id == Run.id)
        .outerjoin(Revision, Revision.id == Run.revision_id)
        .where(Run.project_id == project_id, *chosen)
        .order_by(Run.created_at.desc(), Run.id.desc())
        .limit(limit)
    )
    return [RunLine(*row) for row in rows]


class TaughtBy(NamedTuple):
    """A revision that holds a copy of an interaction, and a run that trained on it."""

    dataset: str
    revision_digest: str
    split: str
    run: Run | None


def taught(session: Session, interaction_id: UUID) -> list[TaughtBy]:
    """Which revisions and runs learned from an interaction, oldest first."""
    rows = session.execute(
        select(Dataset.name, Revision.digest, RevisionExample.split, Run)
        .select_from(Example)
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .join(Revision, Revision.id == RevisionExample.revision_id)
        .join(Dataset, Dataset.id == Revision.dataset_id)
        .outerjoin(Run, Run.revision_id == Revision.id)
        .where(Example.interaction_id == interaction_id)
        .order_by(Revision.id, case((Run.id.is_(None), 1), else_=0), Run.id)
    )
    return [TaughtBy(*row) for row in rows]
