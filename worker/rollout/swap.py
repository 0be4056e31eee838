"""Deploys an artefact the gate has passed: load beside what serves, verify, then put it on trial, or flip at once.

Until that commits nothing has changed for any app; after it the deployment row says what serves, whatever dies. A trial
is the dispatcher's from then on (`worker.rollout.trial`); freeing is reconciliation's.
"""

from typing import Any, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from engine.client import EngineRefused
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.errors import Conflict, NotFound
from services.settings import Settings
from services.store import deployments, evaluations, failpoints, rollouts, runs, trials
from services.store.deployments import Frozen
from services.store.gate_words import evidence, passage
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import Artifact, Job, Project, Run
from services.store.rollout_config import read_rollout
from services.store.rollouts import Decision
from worker.rollout.verify import Comparison, compare, golden_prompts

ACTOR = "rollout"
# An engine that is being restarted is back well within this.
CONNECT_SECONDS = 30.0

log = structlog.get_logger()


class Order(NamedTuple):
    """What the job asks for. `run_id` is None when a person deploys an artefact by hand; `by` is who then, `why` what
    they said."""

    project_id: UUID
    digest: str
    run_id: UUID | None
    by: str
    why: str


class Broken(RuntimeError):
    """The artefact itself is at fault: it is quarantined, what served goes on serving."""


def deploy_job(lease: Lease, settings: Settings) -> None:
    """Handler of "deploy". Raises JobFailed when the artefact is broken, somebody changed the deployment since, or
    promotion is frozen."""
    order = _read_order(lease)
    try:
        generation = _begin(lease, order)
        if generation is None:
            return
        failpoints.reach("deploy.begun")
        with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
            comparison = _stage(client, lease, settings, order)
        failpoints.reach("deploy.verified")
        if lease.cancelled():
            raise JobCancelled
        _release(lease, order, generation, comparison)
        failpoints.reach("deploy.after_flip")
    except Broken as error:
        _give_up(lease, order, "quarantined", str(error))
    except Frozen as error:
        _wait(lease, order, error.message)
    except (Conflict, NotFound) as error:
        _give_up(lease, order, "superseded", error.message)


def _read_order(lease: Lease) -> Order:
    payload = lease.payload
    run_id = payload.get("run_id")
    return Order(
        UUID(payload["project_id"]), str(payload["digest"]), UUID(run_id) if run_id else None,
        by=payload.get("by") or ACTOR, why=payload.get("why") or "",
    )  # fmt: skip


def _begin(lease: Lease, order: Order) -> int | None:
    """The generation this deployment replaces, fixed at the first attempt; None when the digest serves already.

    A later attempt keeps the first one's generation, so that a roll-back between the two is respected.
    """
    with lease.transaction() as session:
        deployment = deployments.get(session, order.project_id)
        if order.digest in (deployment.active_digest, deployment.canary_digest):
            trial = trials.open_of(session, order.project_id)
            _finish_run(session, order, trial.stage if trial and order.digest == trial.digest else "live")
            lease.succeed(session)
            return None
        deployments.require_open(deployment)
        job = session.get_one(Job, lease.job_id, populate_existing=True)
        if "generation" not in job.payload:
            _require_same_baseline(session, order, deployment.active_digest)
            job.payload = {**job.payload, "generation": deployment.generation}
        run = _run(session, order)
        if run is not None:
            runs.enter_phase(session, run, "staging")
        return int(job.payload["generation"])


def _require_same_baseline(session: Session, order: Order, active: str | None) -> None:
    """The gate compared with what served then; if that changed, its verdict says nothing about now."""
    evaluation = evaluations.of_run(session, order.run_id) if order.run_id else None
    if evaluation is not None and evaluation.baseline_digest != active:
        raise Conflict("the deployment changed after the gate compared: what serves now is not its baseline")


def _stage(client: SyncEngineClient, lease: Lease, settings: Settings, order: Order) -> Comparison:
    """Load beside the old and verify. Raises Broken, EngineGone, Conflict."""
    _load(client, settings, order.digest)
    failpoints.reach("deploy.loaded")
    with lease.transaction() as session:
        deployments.advance(session, order.digest, "staged", actor=ACTOR, evidence=_evidence(session, order))
    failpoints.reach("deploy.staged")
    with lease.sessions() as session:
        prompts = golden_prompts(session, order.digest, run_id=order.run_id)
    if not prompts:
        raise Conflict(f"artefact {order.digest[:12]} was never evaluated: there is no record to verify it against")
    comparison = compare(client, Tokenizer.load(settings.model_path), order.digest, prompts)
    log.info("golden prompts compared", digest=order.digest, **comparison.evidence())
    if not comparison.passed:
        raise Broken(
            f"{len(comparison.differing)} of {comparison.asked} golden prompts came back different from the record"
        )
    return comparison


def _load(client: SyncEngineClient, settings: Settings, digest: str) -> None:
    if any(slot.digest == digest and slot.state == "draining" for slot in client.status().slots):
        # No fault of the artefact: reconciliation was freeing it before this job came up.
        raise RuntimeError("the engine is still unloading this artefact")
    try:
        client.load_adapter(digest, str(settings.artifacts / digest))
    except EngineRefused as error:
        if error.transient:
            raise RuntimeError(f"the engine could not load the artefact just now: {error}") from error
        raise Broken(f"the engine refused the artefact: {error}") from error


def _release(lease: Lease, order: Order, generation: int, comparison: Comparison) -> None:
    """On trial, or live at once where the project swaps directly; the run's part ends with either."""
    with lease.transaction() as session:
        reason = _why(session, order)
        found = {**comparison.evidence(), **_evidence(session, order)}
        config = read_rollout(session.get_one(Project, order.project_id).config)
        decision = Decision(order.by, order.why or reason, found, generation)
        if config.mode == "direct":
            deployments.flip(
                session, order.project_id, expected_generation=generation, digest=order.digest, actor=decision.actor,
                reason=decision.reason, evidence=found,
            )  # fmt: skip
            phase = "live"
        else:
            phase = rollouts.begin(session, order.project_id, order.digest, config, decision, order.run_id).stage
        _finish_run(session, order, phase)
        lease.succeed(session)
        failpoints.reach("deploy.before_flip")
    log.info("adapter released", digest=order.digest, mode=config.mode)


def _why(session: Session, order: Order) -> str:
    if order.run_id is None:
        return "deployed by hand"
    return passage(evaluations.of_run(session, order.run_id), f"run {order.run_id}")


def _evidence(session: Session, order: Order) -> dict[str, Any]:
    """The comparison by which it came so far; of a deployment by hand, who ordered it and the last there was."""
    if order.run_id is None:
        return {"ordered_by": order.by, **evidence(evaluations.of_candidate(session, order.digest))}
    return {"run_id": str(order.run_id), **evidence(evaluations.of_run(session, order.run_id))}


def _give_up(lease: Lease, order: Order, phase: str, reason: str) -> None:
    """End the run with the reason; a broken artefact is quarantined, a superseded one keeps its state."""
    with lease.transaction() as session:
        deployments.locked(session, order.project_id)
        artifact = session.get(Artifact, order.digest)
        if phase == "quarantined" and artifact is not None:
            found = _evidence(session, order)
            deployments.advance(session, order.digest, "quarantined", actor=ACTOR, reason=reason, evidence=found)
        run = _run(session, order)
        if run is not None:
            runs.finish(session, run, "failed", phase, reason)
    raise JobFailed(reason)


def _wait(lease: Lease, order: Order, why: str) -> None:
    """The artefact keeps its state and the run has succeeded: a person starts it from there once promotion is open."""
    with lease.transaction() as session:
        run = _run(session, order)
        if run is not None:
            passed = passage(evaluations.of_run(session, run.id), "the candidate").rstrip(".")
            why = f"{passed}; it waits: {why}"
            runs.finish(session, run, "succeeded", runs.WAITING, why)
    raise JobFailed(why)


def _finish_run(session: Session, order: Order, phase: str) -> None:
    run = _run(session, order)
    if run is not None:
        runs.finish(session, run, "succeeded", phase)


def _run(session: Session, order: Order) -> Run | None:
    return runs.get(session, order.run_id) if order.run_id else None
