"""Starts a project's training runs when their time has come: enough new examples, a schedule, or drift.

Only projects that ask for it are looked at, and cheap questions come first. The index over unfinished runs decides when
somebody else starts one at the same moment.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from services.errors import WhetError
from services.store import deployments, drift, runs, served, trials
from services.store.drift_rules import LEAST_LABELS
from services.store.imports import PREVIEW_LIVES
from services.store.models import (
    Dataset,
    DatasetImport,
    DatasetImportExample,
    Example,
    Project,
    ReviewItem,
    Run,
    RunEvent,
)
from services.store.run_params import ADAPTER_KINDS
from services.store.train_when import TrainWhen, last_due, read_config

# After so many failures in a row a person has to look first: a run by hand starts over.
MOST_FAILURES = 3
# Looking for drift reads every judgement since the weights went live, and some thousand prompts.
DRIFT_PAUSE = timedelta(minutes=15)
ACTOR = "cadence"

log = structlog.get_logger()


class TrainCadence:
    """What it remembers only saves work: when drift was last asked for."""

    def __init__(self) -> None:
        self._asked: dict[UUID, datetime] = {}

    def step(self, session: Session, now: datetime) -> list[UUID]:
        """Start what is due; returns the projects."""
        asking = select(Project).where(Project.config.has_key("train_when"))
        return [project.id for project in session.scalars(asking) if self._start(session, project, now)]

    def _start(self, session: Session, project: Project, now: datetime) -> bool:
        when = read_config(project.config)
        past = _past(session, project.id)
        if not when.wanted or not _rested(past, when, now) or not _has_room(session, project.id):
            return False
        trigger = self._trigger(session, project.id, when, past[0] if past else None, now)
        return trigger is not None and _begin(session, project, when, trigger)

    def _trigger(
        self, session: Session, project_id: UUID, when: TrainWhen, last: Run | None, now: datetime
    ) -> dict[str, Any] | None:
        """Why a run is due, as the run keeps it."""
        began = last.created_at if last else None
        line = _by_count(session, project_id, when, began) or _by_schedule(session, project_id, when, began, now)
        return {"line": line} if line else self._by_drift(session, project_id, when, began, now)

    def _by_drift(
        self, session: Session, project_id: UUID, when: TrainWhen, began: datetime | None, now: datetime
    ) -> dict[str, Any] | None:
        """Once for weights that went live; again only when so much was judged since that it is another question."""
        asked = self._asked.get(project_id)
        if not when.drift_points or (asked is not None and now - asked < DRIFT_PAUSE):
            return None
        self._asked[project_id] = now
        since = served.live_since(session, project_id)
        if since is None:
            return None
        note = {"live_since": since.isoformat()}
        enough = LEAST_LABELS if _was_answered(session, project_id, note) else 1
        found = drift.drifted(session, project_id, now=now) if _fresh(session, project_id, began, enough) else None
        if found is None or (found.drop and 100 * (found.drop.before - found.drop.now) < when.drift_points):
            return None
        return {"line": found.reason, **note}


def _past(session: Session, project_id: UUID) -> Sequence[Run]:
    """The last few runs that trained an adapter, newest first."""
    newest = select(Run).where(Run.project_id == project_id, Run.kind.in_(ADAPTER_KINDS))
    return session.scalars(newest.order_by(Run.created_at.desc(), Run.id.desc()).limit(MOST_FAILURES)).all()


def _rested(past: Sequence[Run], when: TrainWhen, now: datetime) -> bool:
    """Whether another may begin: none at work, the pause over, and not failing again and again by itself."""
    if not past:
        return True
    if past[0].state in runs.UNFINISHED or now - past[0].created_at < timedelta(minutes=when.min_minutes):
        return False
    failing = [run.state == "failed" and run.created_by == ACTOR for run in past]
    return len(failing) < MOST_FAILURES or not all(failing)


def _has_room(session: Session, project_id: UUID) -> bool:
    """Whether what passes could be tried on traffic: a run ends at its canary, and the next would take its place."""
    return not deployments.get(session, project_id).frozen and trials.open_of(session, project_id) is None


def _by_count(session: Session, project_id: UUID, when: TrainWhen, began: datetime | None) -> str | None:
    if not when.examples or not _fresh(session, project_id, began, when.examples):
        return None
    return f"{when.examples} answers were reviewed or imported since the last run"


def _fresh(
    session: Session, project_id: UUID, since: datetime | None, enough: int, until: datetime | None = None
) -> bool:
    """Whether so many answers were reviewed, or imported into what is trained on, in (since, until]."""
    reviewed = select(ReviewItem.id).where(ReviewItem.project_id == project_id, ReviewItem.done_at.is_not(None))
    imported = (
        select(Example.id)
        .join(DatasetImportExample, DatasetImportExample.example_id == Example.id)
        .join(DatasetImport, DatasetImport.id == DatasetImportExample.import_id)
        .join(Dataset, Dataset.id == DatasetImport.dataset_id)
        .where(Dataset.project_id == project_id, Dataset.name == runs.DEFAULT_DATASET)
    )
    if since is not None:
        reviewed = reviewed.where(ReviewItem.done_at > since)
        # Its row may be as much older as a preview may wait.
        imported = imported.where(Example.created_at > since, DatasetImport.created_at > since - PREVIEW_LIVES)
    if until is not None:
        reviewed = reviewed.where(ReviewItem.done_at <= until)
        imported = imported.where(Example.created_at <= until)
    found = reviewed.limit(enough).union_all(imported.limit(enough)).subquery()
    return (session.scalar(select(func.count()).select_from(found)) or 0) >= enough


def _by_schedule(
    session: Session, project_id: UUID, when: TrainWhen, began: datetime | None, now: datetime
) -> str | None:
    """A time that has passed trains nothing when nothing had been reviewed or imported by then."""
    clock = last_due(when, now)
    if clock is not None and (began is None or began < clock) and _fresh(session, project_id, began, 1, until=clock):
        return f"every day at {when.daily_at} UTC"
    hourly = bool(when.every_hours) and (began is None or now - began >= timedelta(hours=when.every_hours))
    return f"every {when.every_hours:g} hours" if hourly and _fresh(session, project_id, began, 1) else None


def _was_answered(session: Session, project_id: UUID, note: dict[str, Any]) -> bool:
    """Whether a run was started for a drift of these weights."""
    told = exists().where(
        RunEvent.run_id == Run.id, Run.project_id == project_id, RunEvent.kind == "trigger",
        RunEvent.payload.contains(note),
    )  # fmt: skip
    return bool(session.scalar(select(told)))


def _begin(session: Session, project: Project, when: TrainWhen, trigger: dict[str, Any]) -> bool:
    try:
        with session.begin_nested():
            note = {**trigger, "kind": when.kind}
            run = runs.start(session, project, params={}, created_by=ACTOR, kind=when.kind, trigger=note)
    except WhetError as error:
        log.warning("a run is due and cannot be started", project=project.slug, error=error.message)
        return False
    log.info("run started", project=project.slug, run=str(run.id), reason=trigger["line"])
    return True
