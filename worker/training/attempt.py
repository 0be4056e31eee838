"""What the training jobs of both kinds of runs do alike: sweep, run the trainer process, report, end the run."""

import shutil
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import structlog
from sqlalchemy.exc import OperationalError

from services.settings import Settings
from services.store import runs
from services.store.jobs import JobCancelled, JobFailed, Lease
from worker.training import child, workspace
from worker.training.spec import HeadsProgress, HeadsSpec, Progress, Report, Spec, Trial, Validated

log = structlog.get_logger()
KINDS = {Progress: "progress", HeadsProgress: "progress", Validated: "validation", Trial: "trial"}


def sweep_finished(lease: Lease, settings: Settings) -> None:
    """Remove what runs that are over have left on disk."""
    with lease.sessions() as session:
        workspace.sweep_finished(session, settings.home)


def sweep(lease: Lease, settings: Settings, keep: str = "") -> None:
    """Remove that, and what earlier attempts of this run left; `keep` outlives attempts."""
    sweep_finished(lease, settings)
    workspace.sweep_attempts(settings.home, lease.payload["run_id"], keep={str(lease.fence), keep})


def remove_work(settings: Settings, run_id: UUID) -> None:
    """A run that is over leaves no copy of what it read behind."""
    shutil.rmtree(settings.home / "runs" / str(run_id), ignore_errors=True)


def run_trainer(lease: Lease, run_id: UUID, spec: Spec | HeadsSpec, work: Path) -> None:
    """Raises JobCancelled, JobFailed, TrainerDied (worth another attempt), LostLease."""
    enter(lease, run_id, "training")
    try:
        finished = child.run(
            spec,
            work,
            on_report=lambda report: record(lease, run_id, report),
            stop=lambda: lease.lost.is_set() or lease.cancelled(),
            # With a tail, which is what marks a line that may quote a row: an erasure empties both.
            on_line=lambda line: _add(lease, run_id, "log", {"line": f"trainer: {line}", "tail": ""}),
        )
    except child.TrainerRefused as error:
        raise JobFailed(f"the trainer refused: {error}") from error
    except child.TrainerDied as error:
        with lease.transaction() as session:
            runs.add_event(session, run_id, "log", {"line": str(error), "tail": error.tail})
        if error.killed:
            raise
        raise JobFailed(str(error)) from error
    if not finished:
        with lease.transaction():  # raises LostLease when that is why
            raise JobCancelled


def record(lease: Lease, run_id: UUID, report: Report) -> None:
    """Append what the trainer reports to the run's events."""
    payload: dict[str, Any] = {name: getattr(report, name) for name in report.__struct_fields__}
    _add(lease, run_id, KINDS.get(type(report), "log"), payload, getattr(report, "step", None))


def _add(lease: Lease, run_id: UUID, kind: str, payload: dict[str, Any], step: int | None = None) -> None:
    """Minutes of training are not thrown away for an event that Postgres could not take."""
    try:
        with lease.transaction() as session:
            runs.add_event(session, run_id, kind, payload, step=step)
    except OperationalError as error:
        log.warning("progress not stored", error=str(error), **payload)


def enter(lease: Lease, run_id: UUID, phase: str) -> None:
    """The run is at work on `phase`."""
    with lease.transaction() as session:
        runs.enter_phase(session, runs.get(session, run_id), phase)


def finish(
    lease: Lease, run_id: UUID, state: Literal["succeeded", "failed", "cancelled"], phase: str, error: str | None
) -> None:
    """End the run."""
    with lease.transaction() as session:
        runs.finish(session, runs.get(session, run_id), state, phase, error)
