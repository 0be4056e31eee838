"""Work nobody asks for: sampling when a window closes, training of heads, the heartbeat job, housekeeping."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from services.errors import Conflict, WhetError
from services.store import embeddings, jobs, runs
from services.store.models import Artifact, Deployment, Job, Project, Run, RunEvent
from services.store.speculation import SpeculationConfig, read_config
from services.store.speculation_log import newest_base, response_tokens

DEFAULT_WINDOW_SECONDS = 3600
LONGEST_GRACE_SECONDS = 60
# The shipper is at most this far behind the gateway in ordinary times.
SETTLE_SECONDS = 5.0
ROUTINE_KINDS = (
    "heartbeat", "review.sample", "search.embed", "pins.check", "examples.embed", "webhook.deliver", "shadow",
)  # fmt: skip
# Vectors are made of answers that are this old, so that a burst of traffic has the engine to itself, and no oftener.
EMBED_REST = timedelta(seconds=30)
EMBED_PAUSE = timedelta(seconds=30)
LONGEST_EMBED_PAUSE = timedelta(hours=1)
ROUTINE_KEPT = timedelta(hours=24)
# No answer takes longer to land.
HORIZON = timedelta(minutes=10)
# After so many failures in a row only new reasons start another training.
MOST_FAILURES = 3

log = structlog.get_logger()


class Window(NamedTuple):
    """A project's sampling window that has closed, by its end."""

    project_id: UUID
    closed_at: datetime


class Sampler:
    """Enqueues `review.sample` once for each closed window. Forgets nothing that matters when it is restarted."""

    def __init__(self) -> None:
        self._done: dict[UUID, datetime] = {}

    def step(self, session: Session, now: datetime) -> list[UUID]:
        """Enqueue what is due; returns the projects. The ledger is only asked when a window has closed."""
        due = [window for window in _closed_windows(session, now) if self._is_new(window)]
        asked = [window.project_id for window in due if not _was_sampled(session, window) and _enqueue(session, window)]
        self._done.update(due)
        return asked

    def _is_new(self, window: Window) -> bool:
        return self._done.get(window.project_id) != window.closed_at


class Indexer:
    """Enqueues `search.embed` for projects whose newest answers have no vectors yet.

    A project that got none since it was last asked (the engine is away, or makes no vectors) is asked ever more rarely.
    """

    def __init__(self) -> None:
        self._asked: dict[UUID, Asked] = {}

    def step(self, session: Session, now: datetime) -> list[UUID]:
        """Enqueue what is due; returns the projects."""
        asked = []
        for project in session.scalars(select(Project)):
            last = self._asked.get(project.id)
            if (last is not None and now < last.again) or not embeddings.kept(project):
                continue
            newest = embeddings.newest(session, project.id)
            if embeddings.behind(session, project.id, newest, now - EMBED_REST):
                stuck = last is not None and last.newest == newest
                pause = min(last.pause * 2, LONGEST_EMBED_PAUSE) if last is not None and stuck else EMBED_PAUSE
                self._asked[project.id] = Asked(now + pause, pause, newest)
                if _enqueue_embedding(session, project.id):
                    asked.append(project.id)
        return asked


class Asked(NamedTuple):
    """When a project may be asked again, the pause until then, and the newest answer that had a vector."""

    again: datetime
    pause: timedelta
    newest: UUID | None


def _enqueue_embedding(session: Session, project_id: UUID) -> bool:
    """Last in line: nothing waits for it."""
    try:
        jobs.enqueue(
            session, "search.embed", {"project_id": str(project_id)}, project_id=project_id,
            dedupe_key=f"search.embed:{project_id}", priority=-10, max_attempts=1,
        )  # fmt: skip
    except Conflict:
        return False
    return True


class SpeculatorCadence:
    """Starts a project's speculator runs: the first, when traffic has grown or drifted, for a new adapter or base.

    What it remembers is only a sum over settled rows of the log, to count them once.
    """

    def __init__(self) -> None:
        self._counted: dict[UUID, Counted] = {}

    def step(self, session: Session, now: datetime, drifted: Collection[UUID] = ()) -> list[UUID]:
        """Start what is due; returns the projects. Whoever starts a run at the same moment wins."""
        started = []
        for project, deployment in session.execute(
            select(Project, Deployment).join(Deployment, Deployment.project_id == Project.id)
        ):
            why = self._why(session, project, deployment, now, drifted)
            if why is not None and _start_training(session, project, deployment, why):
                started.append(project.id)
        return started

    def _why(
        self, session: Session, project: Project, deployment: Deployment, now: datetime, drifted: Collection[UUID]
    ) -> "Why | None":
        config = read_config(project.config)
        # While heads are on trial nobody knows yet what the next ones would have to beat.
        if not (config.enabled and config.automatic) or deployment.speculator_canary_digest is not None:
            return None
        past = _past_trainings(session, project.id)
        if past and not _rested(past, config, now):
            return None
        tokens = self._count(session, project.id, now)
        if tokens < config.first_tokens:
            return None
        if not past:
            return Why(f"{tokens} response tokens are enough for the first heads", tokens)
        reason = _reason(session, past, deployment, config, now, drifted)
        return Why(reason, tokens) if reason else None

    def _count(self, session: Session, project_id: UUID, now: datetime) -> int:
        """Response tokens of live traffic. Rows older than the horizon have landed, however long they took."""
        horizon = now - HORIZON
        known = self._counted.get(project_id, Counted(0, None))
        older = response_tokens(session, project_id, since=known.until, until=horizon)
        self._counted[project_id] = Counted(known.tokens + older, horizon)
        return known.tokens + older + response_tokens(session, project_id, since=horizon)


class Counted(NamedTuple):
    """Response tokens of a project that began before `until`."""

    tokens: int
    until: datetime | None


class Why(NamedTuple):
    """What makes a training due, and the response tokens there were then."""

    reason: str
    tokens: int


def _past_trainings(session: Session, project_id: UUID) -> Sequence[Run]:
    """The last few, newest first."""
    query = select(Run).where(Run.project_id == project_id, Run.kind == "speculator")
    return session.scalars(query.order_by(Run.created_at.desc(), Run.id.desc()).limit(MOST_FAILURES + 1)).all()


def _rested(past: Sequence[Run], config: SpeculationConfig, now: datetime) -> bool:
    return past[0].state not in runs.UNFINISHED and now - past[0].created_at >= timedelta(minutes=config.min_minutes)


def _reason(
    session: Session,
    past: Sequence[Run],
    deployment: Deployment,
    config: SpeculationConfig,
    now: datetime,
    drifted: Collection[UUID],
) -> str | None:
    """Why to train again now."""
    last = past[0]
    trained_on = _trained_on(session, last)
    if trained_on is not None and trained_on.adapter != deployment.active_digest and not deployment.speculator_digest:
        return "another adapter serves now"
    if trained_on is not None and _has_another_base(session, trained_on, deployment, config):
        return "another base model serves now"
    failures = next((index for index, run in enumerate(past) if run.phase != "failed"), len(past))
    pause = timedelta(minutes=config.min_minutes * 2**failures)
    rested = now - last.created_at >= pause
    if 0 < failures <= MOST_FAILURES and rested:
        return f"the last training failed ({failures} of {MOST_FAILURES})"
    if rested and deployment.project_id in drifted:
        return "what heads draft is accepted less often than it was"
    before = trained_on.tokens if trained_on else response_tokens(session, last.project_id, until=last.created_at)
    fresh = response_tokens(session, last.project_id, since=last.created_at)
    if fresh >= (config.growth - 1) * max(before, config.first_tokens):
        return f"{fresh} new response tokens since the last training"
    return None


class TrainedOn(NamedTuple):
    """What a run was started with. `base`: None where it is not known."""

    adapter: str | None
    tokens: int
    base: str | None


def _has_another_base(
    session: Session, trained_on: TrainedOn, deployment: Deployment, config: SpeculationConfig
) -> bool:
    """Whether another base answers by now and has said enough: what an earlier one said cannot be learned from."""
    base = newest_base(session, deployment.project_id)
    if deployment.speculator_digest or trained_on.base in (None, base):
        return False
    return response_tokens(session, deployment.project_id, base=base) >= config.first_tokens


def _trained_on(session: Session, run: Run) -> TrainedOn | None:
    """As noted when this cadence started it; from the artefact when a person did; None when it left none."""
    noted = select(RunEvent.payload).where(RunEvent.run_id == run.id, RunEvent.kind == "trigger").limit(1)
    payload = session.scalar(noted)
    artifact = session.get(Artifact, run.artifact_digest) if run.artifact_digest else None
    if payload is not None and "tokens" in payload:
        return TrainedOn(payload["adapter"], payload["tokens"], payload.get("base", artifact and artifact.base_digest))
    if artifact is None:
        return None
    tokens = response_tokens(session, run.project_id, until=run.created_at)
    return TrainedOn(artifact.manifest.get("adapter"), tokens, artifact.base_digest)


def _start_training(session: Session, project: Project, deployment: Deployment, why: Why) -> bool:
    try:
        with session.begin_nested():
            base = newest_base(session, project.id)
            note = {"line": why.reason, "tokens": why.tokens, "adapter": deployment.active_digest, "base": base}
            run = runs.start(session, project, params={}, created_by="cadence", kind="speculator", trigger=note)
    except WhetError as error:
        log.warning("heads are due and cannot be trained", project=project.slug, error=error.message)
        return False
    log.info("training of heads started", project=project.slug, run=str(run.id), reason=why.reason)
    return True


def heartbeat(session: Session) -> None:
    """One heartbeat job a queue; if the last one is unfinished and nothing runs there, nobody serves the queue."""
    for queue in jobs.QUEUES:
        try:
            jobs.enqueue(session, "heartbeat", {}, queue=queue, dedupe_key=f"heartbeat:{queue}", priority=100)
        except Conflict:
            _report_unanswered(session, queue)


def _report_unanswered(session: Session, queue: str) -> None:
    busy = session.scalar(select(func.count()).where(Job.queue == queue, Job.state == "running"))
    if busy:
        log.info("the heartbeat job waits: all hands are busy", queue=queue, running=busy)
    else:
        log.error("the last heartbeat job is unfinished: no worker answers", alarm=True, queue=queue)


def prune(session: Session) -> int:
    """Routine jobs are many and say nothing after a day."""
    return jobs.prune(session, ROUTINE_KINDS, older_than=ROUTINE_KEPT)


def _closed_windows(session: Session, now: datetime) -> list[Window]:
    settled = now.timestamp() - SETTLE_SECONDS
    windows = []
    for project in session.execute(select(Project.id, Project.config)):
        seconds = max(1, int(project.config.get("window_seconds", DEFAULT_WINDOW_SECONDS)))
        # The sampler's own rule: before this grace has passed it would find the window still open.
        grace = int(project.config.get("window_grace_seconds", min(seconds, LONGEST_GRACE_SECONDS)))
        closed = (settled - grace) // seconds * seconds
        windows.append(Window(project.id, datetime.fromtimestamp(closed, UTC)))
    return windows


def _was_sampled(session: Session, window: Window) -> bool:
    since = exists().where(
        Job.kind == "review.sample", Job.project_id == window.project_id, Job.created_at >= window.closed_at
    )
    return bool(session.scalar(select(since)))


def _enqueue(session: Session, window: Window) -> bool:
    project = str(window.project_id)
    try:
        jobs.enqueue(
            session,
            "review.sample",
            {"project_id": project},
            project_id=window.project_id,
            dedupe_key=f"review.sample:{project}",
        )
    except Conflict:
        log.info("sampling of the last window is still going on", project=project)
        return False
    return True
