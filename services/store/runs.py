"""Training runs: parameters checked at the door, one unfinished run of a sort a project, and what runs report.

A run crosses several jobs (dataset.build, train, evaluate, deploy); `run.job_id` is the one that carries it now.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import datasets, jobs, run_params, webhooks
from services.store.evaluation_config import BASE_ABILITY
from services.store.models import Artifact, Dataset, Job, Project, Revision, Run, RunEvent

UNFINISHED = ("queued", "running")
TRAININGS = ("train", "train.speculator")
DEFAULT_DATASET = "golden"
# How a run ends whose candidate may go on and must not yet: the state that its artefact stays in.
WAITING = "verified"
MOST_RETRIES = 3
# How the errors begin of runs whose trainer rendered prompts otherwise than the engine does.
TEMPLATE_DRIFT = "template drift: "


def start(
    session: Session,
    project: Project,
    *,
    params: dict[str, Any],
    created_by: str,
    dataset: str = DEFAULT_DATASET,
    kind: str = "sft",
    revision: Revision | None = None,
    trigger: dict[str, Any] | None = None,
) -> Run:
    """A queued run and its first job: train on `revision`, or build a fresh one of `dataset` before that.

    A run of kind "speculator" trains heads on the log instead. `trigger` says why it began: {"line": …}; by hand when
    None. Raises InvalidRequest for bad parameters or the base-ability set, Conflict while another run of the project
    and of this sort is unfinished.
    """
    if dataset == BASE_ABILITY and kind != "speculator":
        raise InvalidRequest(run_params.NOT_TAUGHT, param="dataset")
    checked = run_params.checked(kind, params, project.config)
    settle(session, project.id)
    run = Run(project_id=project.id, kind=kind, params=checked.model_dump(mode="json"), created_by=created_by)
    if kind != "speculator":
        run.dataset_id = datasets.get_or_create(session, project.id, dataset).id
        run.revision_id = revision.id if revision else None
    _insert_alone(session, run)
    add_event(session, run.id, "phase", {"phase": "queued", "by": created_by})
    add_event(session, run.id, "trigger", trigger or {"line": "by hand"})
    _first_job(session, run, dataset)
    return run


def _first_job(session: Session, run: Run, dataset: str) -> Job:
    if run.kind == "speculator":
        return hand_over(session, run, "train.speculator", {"run_id": str(run.id)})
    if run.revision_id is not None:
        return hand_over(session, run, "train", {"run_id": str(run.id)})
    payload = {"project_id": str(run.project_id), "dataset": dataset, "run_id": str(run.id)}
    return hand_over(session, run, "dataset.build", payload)


def retry(session: Session, run: Run, created_by: str) -> Run:
    """The same again as a run of its own, on the same revision; one whose artefact was never judged goes on itself,
    at its evaluation. Raises Conflict unless it failed or was cancelled, or too often."""
    if run.state not in ("failed", "cancelled"):
        raise Conflict(f"only a run that failed or was cancelled can be tried again; this one is {run.state}")
    root = _root(session, run)
    number = _retries(session, run.project_id, root) + 1
    if number > MOST_RETRIES:
        raise Conflict(f"tried again {MOST_RETRIES} times already: change something and start a new run")
    told = {"line": f"retry {number} of {MOST_RETRIES}", "root": root}
    if _unjudged(session, run):
        return _evaluate_again(session, run, created_by, told)
    project = session.get_one(Project, run.project_id)
    dataset = session.get(Dataset, run.dataset_id) if run.dataset_id else None
    return start(
        session, project, params=run.params, created_by=created_by, kind=run.kind,
        dataset=dataset.name if dataset else DEFAULT_DATASET,
        revision=session.get(Revision, run.revision_id) if run.revision_id else None,
        trigger={**told, "retry_of": str(run.id)},
    )  # fmt: skip


def _unjudged(session: Session, run: Run) -> bool:
    """Whether what the run trained only waits for the gate, which can ask it: not what another template taught."""
    artifact = session.get(Artifact, run.artifact_digest, populate_existing=True) if run.artifact_digest else None
    drifted = (run.error or "").startswith(TEMPLATE_DRIFT)
    return artifact is not None and artifact.state == "built" and artifact.tainted_at is None and not drifted


def _evaluate_again(session: Session, run: Run, actor: str, told: dict[str, Any]) -> Run:
    settle(session, run.project_id)
    resume(session, run, "evaluating", f"{actor} tried again: what was trained is there, so it goes on from there")
    add_event(session, run.id, "trigger", told)
    run.job_id = None  # the last job is over, and what was asked of it does not hold for the next
    kind = "evaluate.speculator" if run.kind == "speculator" else "evaluate"
    hand_over(session, run, kind, {"run_id": str(run.id)})
    return run


def _root(session: Session, run: Run) -> str:
    """The run that a run repeats, through all retries of retries."""
    told = select(RunEvent.payload).where(RunEvent.run_id == run.id, RunEvent.kind == "trigger").limit(1)
    return str((session.scalar(told) or {}).get("root", run.id))


def _retries(session: Session, project_id: UUID, root: str) -> int:
    """How often a run was tried again, itself or by a retry of it."""
    told = select(func.count()).where(
        RunEvent.run_id == Run.id, Run.project_id == project_id, RunEvent.kind == "trigger",
        RunEvent.payload.contains({"root": root}),
    )  # fmt: skip
    return session.scalar(told) or 0


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
    """Enqueue the run's next job, in the transaction that ends the last one.

    Raises JobCancelled when that one was asked to stop.
    """
    last = session.get(Job, run.job_id, populate_existing=True) if run.job_id else None
    if last is not None and last.state in jobs.UNFINISHED and last.cancel_requested:
        raise jobs.JobCancelled
    queue = jobs.TRAIN if kind in TRAININGS else jobs.CPU
    job = jobs.enqueue(
        session, kind, payload, queue=queue, project_id=run.project_id, dedupe_key=f"run:{run.id}:{kind}"
    )
    run.job_id = job.id
    session.flush()
    return job


def get(session: Session, run_id: UUID) -> Run:
    """Raises NotFound."""
    run = session.get(Run, run_id)
    if run is None:
        raise NotFound(f"no run {run_id}")
    return run


def unfinished(session: Session, project_id: UUID, *, speculator: bool = False) -> Run | None:
    """The project's run at work, of adapters or of heads; there is one at most."""
    at_work = select(Run).where(
        Run.project_id == project_id, Run.state.in_(UNFINISHED), (Run.kind == "speculator") == speculator
    )
    return session.scalars(at_work).one_or_none()


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


def went_on(session: Session, digest: str, phase: str) -> None:
    """What has become of weights since the run that made them was over: on trial, live, or taken back from there.

    However it ended: weights that somebody deployed by hand serve, whether their own deployment failed, was cancelled
    or was overtaken, so the run has succeeded after all.
    """
    over = (
        update(Run)
        .where(Run.artifact_digest == digest, Run.state.not_in(UNFINISHED), Run.phase != phase)
        .values(phase=phase, state="succeeded", error=None)
        .returning(Run.id)
    )
    for run_id in session.scalars(over).all():
        add_event(session, run_id, "phase", {"phase": phase})


def resume(session: Session, run: Run, phase: str, why: str) -> None:
    """A finished run goes on after all. Raises Conflict while another run of the project is unfinished."""
    try:
        with session.begin_nested():
            run.finished_at = run.error = None
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
    asked = None
    while run.state in UNFINISHED and run.job_id is not None and run.job_id != asked:
        asked = run.job_id
        jobs.request_cancel(session, asked)
        session.refresh(run)  # asking may have waited for the hand-over to another job
    if run.state not in UNFINISHED:
        raise Conflict(f"the run is over: {run.state}")
    settle(session, run.project_id)
    add_event(session, run.id, "log", {"line": "cancel requested"})
    return run


def settle(session: Session, project_id: UUID | None = None) -> Sequence[Run]:
    """End the runs whose job ended without ending them: it died three times, waited in vain, or was cancelled before a
    worker took it."""
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
