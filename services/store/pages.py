"""What the console's overview pages show: a project's loop in figures, the queue, what teaches what."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, case, func, select
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
from services.store.reviews import COUNTED, standing

SPARK_HOURS = 24


class Card(NamedTuple):
    """A project on the home page. `hours` are requests an hour over the last day, oldest first."""

    project: Project
    requests_hour: int
    hours: list[int]
    waiting: int
    digest: str | None
    generation: int
    last_swap: datetime | None
    running: str | None


class Loop(NamedTuple):
    """One turn of the loop in figures: served, logged, reviewed, learned, live."""

    served_hour: int
    logged_day: int
    failed_day: int
    median_ms: float | None
    waiting: int
    escalated: int
    reviewed: int
    reviewed_day: int
    learned: int
    revision_digest: str | None
    runs: int
    digest: str | None
    generation: int
    live_since: datetime | None


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
    """One card a project, in the order given; a handful of grouped queries whatever their number."""
    ids = [project.id for project in projects]
    hours = _hours(session, ids)
    hour = _tally(session, select(Interaction.project_id).where(_since(_ago(timedelta(hours=1)))), ids)
    waiting = _tally(session, select(ReviewItem.project_id).where(ReviewItem.state == "open"), ids)
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
            requests_hour=hour.get(project.id, 0),
            hours=hours.get(project.id, [0] * SPARK_HOURS),
            waiting=waiting.get(project.id, 0),
            digest=deployments[project.id].active_digest if project.id in deployments else None,
            generation=deployments[project.id].generation if project.id in deployments else 1,
            last_swap=swaps.get(project.id),
            running=running.get(project.id),
        )
        for project in projects
    ]


def _ago(span: timedelta) -> datetime:
    return datetime.now(UTC) - span


def _tally(session: Session, rows: Select[UUID], ids: Sequence[UUID]) -> dict[UUID, int]:
    """How many of the rows each of these projects has."""
    project_id = rows.selected_columns[0]
    counted = rows.where(project_id.in_(ids)).group_by(project_id).add_columns(func.count())
    return dict(session.execute(counted).all())


def _hours(session: Session, ids: Sequence[UUID]) -> dict[UUID, list[int]]:
    ago = func.floor(func.extract("epoch", func.now() - Interaction.started_at) / 3600)
    rows = session.execute(
        select(Interaction.project_id, ago.label("ago"), func.count().label("requests"))
        .where(Interaction.project_id.in_(ids), _since(_ago(timedelta(hours=SPARK_HOURS))))
        .group_by(Interaction.project_id, "ago")
    )
    series: dict[UUID, list[int]] = {}
    for project_id, hours_ago, requests in rows:
        line = series.setdefault(project_id, [0] * SPARK_HOURS)
        place = SPARK_HOURS - 1 - int(hours_ago)
        if 0 <= place < SPARK_HOURS:
            line[place] += requests
    return series


# --- one project ------------------------------------------------------------------------------------------


def loop(session: Session, project_id: UUID) -> Loop:
    """The figures under the loop strip."""
    served, failed, logged, median = session.execute(
        select(
            func.count().filter(Interaction.id >= first_id(_ago(timedelta(hours=1)))),
            func.count().filter(Interaction.finish_reason == "error"),
            func.count(),
            func.percentile_cont(0.5).within_group(Interaction.latency_ms),
        ).where(Interaction.project_id == project_id, _since(_ago(timedelta(days=1))))
    ).one()
    waiting, escalated = session.execute(
        select(
            func.count().filter(ReviewItem.state == "open"), func.count().filter(ReviewItem.state == "escalated")
        ).where(ReviewItem.project_id == project_id, ReviewItem.state.in_(("open", "escalated")))
    ).one()
    judged = select(
        func.count(), func.count().filter(Annotation.created_at >= _ago(timedelta(days=1)))
    ).where(Annotation.project_id == project_id, Annotation.verdict.in_(COUNTED), standing())  # fmt: skip
    reviewed, reviewed_day = session.execute(judged).one()
    revision = session.scalar(
        select(Revision)
        .join(Dataset, Dataset.id == Revision.dataset_id)
        .where(Dataset.project_id == project_id)
        .order_by(Revision.id.desc())
        .limit(1)
    )
    deployment = session.get(Deployment, project_id, populate_existing=True)
    return Loop(
        served_hour=served,
        logged_day=logged,
        failed_day=failed,
        median_ms=median,
        waiting=waiting,
        escalated=escalated,
        reviewed=reviewed,
        reviewed_day=reviewed_day,
        learned=revision.train_count + revision.held_out_count if revision else 0,
        revision_digest=revision.digest if revision else None,
        runs=session.scalar(select(func.count()).select_from(Run).where(Run.project_id == project_id)) or 0,
        digest=deployment.active_digest if deployment else None,
        generation=deployment.generation if deployment else 1,
        live_since=_last_change(session, project_id),
    )


def _last_change(session: Session, project_id: UUID) -> datetime | None:
    return session.scalar(select(func.max(DeploymentEvent.at)).where(DeploymentEvent.project_id == project_id))


def waiting(session: Session, project_id: UUID) -> int:
    """The badge beside Review."""
    open_items = select(func.count()).where(ReviewItem.project_id == project_id, ReviewItem.state == "open")
    return session.scalar(open_items) or 0


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
    """Corrected rows two people judged, or failing those any corrected rows; held-out rows are never shown."""
    query = (
        select(Example)
        .where(Example.project_id == project_id, Example.source == "corrected", Example.split == "train")
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


def run_lines(session: Session, project_id: UUID, *, limit: int = 50) -> list[RunLine]:
    """Newest first."""
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
        .where(Run.project_id == project_id)
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
