"""Starts a project's training runs when their time has come: enough new examples, a schedule, or drift.

Only projects that ask for it are looked at, and cheap questions come first. The index over unfinished runs decides when
somebody else starts one at the same moment.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.errors import WhetError
from services.store import quality, runs
from services.store.models import Project, ReviewItem, Run
from services.store.run_params import ADAPTER_KINDS
from services.store.train_when import TrainWhen, last_due, read_config

# After so many failures in a row a person has to look first: a run by hand, or new parameters, starts over.
MOST_FAILURES = 3
# Estimating quality reads every judgement of a fortnight.
DRIFT_PAUSE = timedelta(minutes=15)
DRIFT_SPAN = timedelta(days=14)
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
        if not when.wanted or not _rested(past, when, now):
            return False
        reason = self._reason(session, project.id, when, past[0] if past else None, now)
        return reason is not None and _begin(session, project, when, reason)

    def _reason(
        self, session: Session, project_id: UUID, when: TrainWhen, last: Run | None, now: datetime
    ) -> str | None:
        return (
            _by_count(session, project_id, when, last)
            or _by_schedule(session, project_id, when, last, now)
            or self._by_drift(session, project_id, when, last, now)
        )

    def _by_drift(
        self, session: Session, project_id: UUID, when: TrainWhen, last: Run | None, now: datetime
    ) -> str | None:
        asked = self._asked.get(project_id)
        if not when.drift_points or last is None or (asked is not None and now - asked < DRIFT_PAUSE):
            return None
        self._asked[project_id] = now
        return _fallen(session, project_id, when.drift_points, last.created_at, now)


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


def _by_count(session: Session, project_id: UUID, when: TrainWhen, last: Run | None) -> str | None:
    if not when.examples:
        return None
    fresh = _reviewed_since(session, project_id, last.created_at if last else None, most=when.examples)
    return f"{when.examples} answers were reviewed since the last run" if fresh >= when.examples else None


def _reviewed_since(session: Session, project_id: UUID, since: datetime | None, *, most: int) -> int:
    """Review items done since then, counted up to `most`; an index knows them by time."""
    done = select(ReviewItem.id).where(ReviewItem.project_id == project_id, ReviewItem.done_at.is_not(None))
    if since is not None:
        done = done.where(ReviewItem.done_at > since)
    return session.scalar(select(func.count()).select_from(done.limit(most).subquery())) or 0


def _by_schedule(session: Session, project_id: UUID, when: TrainWhen, last: Run | None, now: datetime) -> str | None:
    """A time that has passed trains nothing when nobody has reviewed anything since the last run."""
    began = last.created_at if last else None
    clock = last_due(when, now)
    daily = clock is not None and (began is None or began < clock)
    hourly = bool(when.every_hours) and (began is None or now - began >= timedelta(hours=when.every_hours))
    if not (daily or hourly) or not _reviewed_since(session, project_id, began, most=1):
        return None
    return f"every day at {when.daily_at} UTC" if daily else f"every {when.every_hours:g} hours"


def _fallen(session: Session, project_id: UUID, points: float, began: datetime, now: datetime) -> str | None:
    """Whether live quality is surely lower than before: the two intervals lie so many points apart or more."""
    before = quality.estimate_quality(session, project_id, since=began - DRIFT_SPAN, until=began)
    after = quality.estimate_quality(session, project_id, since=max(began, now - DRIFT_SPAN), until=now)
    if before is None or after is None or before.rate - after.rate < points / 100 or after.high >= before.low:
        return None
    return f"live quality fell from {before.rate:.1%} to {after.rate:.1%} since the last run"


def _begin(session: Session, project: Project, when: TrainWhen, reason: str) -> bool:
    try:
        with session.begin_nested():
            note = {"line": reason, "kind": when.kind}
            run = runs.start(session, project, params={}, created_by=ACTOR, kind=when.kind, trigger=note)
    except WhetError as error:
        log.warning("a run is due and cannot be started", project=project.slug, error=error.message)
        return False
    log.info("run started", project=project.slug, run=str(run.id), reason=reason)
    return True
