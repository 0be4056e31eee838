"""Training runs: parameters checked at the door, one unfinished run of a sort a project, and what runs report.

A run crosses several jobs (dataset.build, train, evaluate, deploy); `run.job_id` is the one that carries it now.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import datasets, jobs, webhooks
from services.store.models import Job, Project, Revision, Run, RunEvent

UNFINISHED = ("queued", "running")
DEFAULT_DATASET = "golden"
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Params = TypeVar("Params", bound=BaseModel)
EVERY_LINEAR: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TrainParams(BaseModel):
    """How a LoRA run trains. Defaults suit a few hundred corrections; a project's `train` config overrides them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, le=256)
    alpha: float = Field(32.0, gt=0, le=1024)
    lr: float = Field(2e-3, gt=0, le=0.1)
    epochs: float = Field(4.0, gt=0, le=100)
    max_steps: int = Field(0, ge=0, le=100_000, description="Stops the run early; 0 leaves it to `epochs`.")
    batch_size: int = Field(8, ge=1, le=256)
    warmup: float = Field(0.05, ge=0, le=0.5, description="Share of the steps over which the rate rises.")
    max_length: int = Field(1024, ge=16, le=131_072, description="Longest prompt plus answer, in tokens.")
    seed: int = Field(0, ge=0, le=2**31 - 1)
    targets: tuple[Target, ...] = Field(EVERY_LINEAR, min_length=1)


class SpeculatorParams(BaseModel):
    """How heads are trained. Defaults are those of benchmarks/results/heads.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(4, ge=1, le=16, description="Tokens drafted at most.")
    vocabulary: int = Field(1024, ge=16, le=131_072, description="Words that can be drafted, the most frequent ones.")
    conditioning: Literal["none", "hydra"] = Field("hydra", description="Whether heads are told the token before.")
    lr: float = Field(1e-2, gt=0, le=0.1)
    epochs: float = Field(3.0, gt=0, le=100)
    max_tokens: int = Field(
        500_000,
        ge=1000,
        le=100_000_000,
        description="Tokens read, prompts included; a request counts for a 60th of them at most.",
    )
    min_requests: int = Field(60, ge=60, le=1_000_000, description="Logged requests it takes to begin.")
    seed: int = Field(0, ge=0, le=2**31 - 1)


def check_params(project: Project, params: dict[str, Any]) -> TrainParams:
    """Defaults, then the project's `train` config, then `params`. Raises InvalidRequest naming the parameter."""
    return _checked(TrainParams, {**project.config.get("train", {}), **params})


def _checked(kind: type[Params], chosen: dict[str, Any]) -> Params:
    try:
        return kind.model_validate(chosen)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(kind.model_fields)
        hint = f" (known: {known})" if first["type"] == "extra_forbidden" else ""
        raise InvalidRequest(f"training parameter {name}: {first['msg']}{hint}", param=name) from error


def start(
    session: Session,
    project: Project,
    *,
    params: dict[str, Any],
    created_by: str,
    dataset: str = DEFAULT_DATASET,
    kind: str = "sft",
    revision: Revision | None = None,
) -> Run:
    """A queued run and its first job: train on `revision`, or build a fresh one of `dataset` before that.

    A run of kind "speculator" trains heads on the log instead. Raises InvalidRequest for bad parameters, Conflict while
    another run of the project and of this sort is unfinished.
    """
    if kind == "speculator":
        return _start_speculator(session, project, params, created_by)
    if kind != "sft":
        raise InvalidRequest(f"runs of kind {kind} cannot be started here; only sft and speculator", param="kind")
    checked = check_params(project, params)
    settle(session, project.id)
    run = Run(
        project_id=project.id,
        kind=kind,
        params=checked.model_dump(mode="json"),
        dataset_id=datasets.get_or_create(session, project.id, dataset).id,
        revision_id=revision.id if revision else None,
        created_by=created_by,
    )
    _insert_alone(session, run)
    if revision is None:
        payload = {"project_id": str(project.id), "dataset": dataset, "run_id": str(run.id)}
        hand_over(session, run, "dataset.build", payload)
    else:
        hand_over(session, run, "train", {"run_id": str(run.id)})
    add_event(session, run.id, "phase", {"phase": "queued", "by": created_by})
    return run


def _start_speculator(session: Session, project: Project, params: dict[str, Any], created_by: str) -> Run:
    checked = _checked(SpeculatorParams, params)
    settle(session, project.id)
    run = Run(project_id=project.id, kind="speculator", params=checked.model_dump(mode="json"), created_by=created_by)
    _insert_alone(session, run)
    hand_over(session, run, "train.speculator", {"run_id": str(run.id)})
    add_event(session, run.id, "phase", {"phase": "queued", "by": created_by})
    return run


def _insert_alone(session: Session, run: Run) -> None:
    """The partial unique index decides between two who start at once."""
    try:
        with session.begin_nested():
            session.add(run)
            session.flush()
    except IntegrityError as error:
        if "uq_run_unfinished" not in str(error):
            raise
        raise Conflict("a run of this project is unfinished: wait for it, or cancel it") from error


def hand_over(session: Session, run: Run, kind: str, payload: dict[str, Any]) -> Job:
    """Enqueue the run's next job, in the transaction that ends the last one."""
    job = jobs.enqueue(session, kind, payload, project_id=run.project_id, dedupe_key=f"run:{run.id}:{kind}")
    run.job_id = job.id
    session.flush()
    return job


def get(session: Session, run_id: UUID) -> Run:
    """Raises NotFound."""
    run = session.get(Run, run_id)
    if run is None:
        raise NotFound(f"no run {run_id}")
    return run


def list_(session: Session, project_id: UUID, *, limit: int = 50) -> list[Run]:
    """Newest first."""
    newest = select(Run).where(Run.project_id == project_id).order_by(Run.created_at.desc(), Run.id.desc())
    return list(session.scalars(newest.limit(limit)))


def events(session: Session, run_id: UUID, *, after: int = 0, limit: int = 1000) -> list[RunEvent]:
    """Oldest first; `after` is the id of the last one already seen."""
    newer = select(RunEvent).where(RunEvent.run_id == run_id, RunEvent.id > after).order_by(RunEvent.id)
    return list(session.scalars(newer.limit(limit)))


def add_event(session: Session, run_id: UUID, kind: str, payload: dict[str, Any], step: int | None = None) -> RunEvent:
    """Append what a run reports: `progress`, `phase`, `log`."""
    event = RunEvent(run_id=run_id, kind=kind, payload=payload, step=step)
    session.add(event)
    session.flush()
    return event


def enter_phase(session: Session, run: Run, phase: str) -> None:
    """The run is at work on `phase`."""
    run.state = "running"
    run.phase = phase
    run.started_at = run.started_at or datetime.now(UTC)
    add_event(session, run.id, "phase", {"phase": phase})


def finish(
    session: Session, run: Run, state: Literal["succeeded", "failed", "cancelled"], phase: str, error: str | None = None
) -> None:
    """The single ending of a run; later endings of a finished run are ignored, so a re-run job changes nothing."""
    if run.state not in UNFINISHED:
        return
    run.state = state
    run.phase = phase
    run.error = error
    run.finished_at = datetime.now(UTC)
    add_event(session, run.id, "phase", {"phase": phase, "error": error} if error else {"phase": phase})
    webhooks.run_finished(session, run)


def resume(session: Session, run: Run, phase: str, why: str) -> None:
    """A finished run goes on after all. Raises Conflict while another run of the project is unfinished."""
    try:
        with session.begin_nested():
            run.finished_at = None
            run.state, run.phase = "running", phase
            session.flush()
    except IntegrityError as error:
        if "uq_run_unfinished" not in str(error):
            raise
        raise Conflict("another run of this project is unfinished: wait for it, or cancel it") from error
    add_event(session, run.id, "log", {"line": why})
    add_event(session, run.id, "phase", {"phase": phase})


def request_cancel(session: Session, run_id: UUID) -> Run:
    """Ask the run's job to stop; a run whose job no worker holds ends at once. Raises NotFound, Conflict when over."""
    run = get(session, run_id)
    if run.state not in UNFINISHED:
        raise Conflict(f"the run is over: {run.state}")
    if run.job_id is not None:
        jobs.request_cancel(session, run.job_id)
        session.flush()
    settle(session, run.project_id)
    add_event(session, run.id, "log", {"line": "cancel requested"})
    return run


def settle(session: Session, project_id: UUID | None = None) -> Sequence[Run]:
    """End the runs whose job ended without ending them (died three times, or cancelled before a worker took it)."""
    stuck = (
        select(Run, Job)
        .join(Job, Job.id == Run.job_id)
        .where(Run.state.in_(UNFINISHED), Job.state.in_(("failed", "cancelled", "dead")))
        .with_for_update(of=Run, skip_locked=True)
        .execution_options(populate_existing=True)
    )
    if project_id is not None:
        stuck = stuck.where(Run.project_id == project_id)
    ended = []
    for run, job in session.execute(stuck):
        if job.state == "cancelled":
            finish(session, run, "cancelled", "cancelled")
        else:
            finish(session, run, "failed", "failed", job.error or f"job {job.kind} ended {job.state}")
        ended.append(run)
    session.flush()
    return ended
