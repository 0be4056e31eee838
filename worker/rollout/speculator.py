"""Deploys heads the gate has passed: load them beside what drafts, then try them on a share of the traffic.

Heads change no answer, so nothing is compared before they draft; what they are worth, `worker.rollout.watch` finds out.
"""

from typing import Literal, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from engine.client import EngineRefused
from engine.messages import Status
from engine.sync_client import SyncEngineClient
from services.errors import Conflict, NotFound
from services.settings import Settings
from services.store import deployments, failpoints, runs, speculators
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.lifecycle import CONDEMNED
from services.store.models import Artifact, Project
from services.store.speculation import read_config
from services.store.speculators import Decision

ACTOR = "rollout"
# An engine that is being restarted is back well within this.
CONNECT_SECONDS = 30.0

log = structlog.get_logger()


class Order(NamedTuple):
    """What the job asks for. `run_id` is None when a person deploys heads by hand."""

    project_id: UUID
    digest: str
    run_id: UUID | None


class Broken(RuntimeError):
    """The heads themselves are at fault: they are quarantined, what drafted goes on drafting."""


def deploy_speculator_job(lease: Lease, settings: Settings) -> None:
    """Handler of "deploy.speculator". Raises JobFailed when the heads are broken or another adapter serves by now."""
    run_id = lease.payload.get("run_id")
    order = Order(UUID(lease.payload["project_id"]), str(lease.payload["digest"]), UUID(run_id) if run_id else None)
    try:
        adapter = _begin(lease, order)
        failpoints.reach("deploy_speculator.begun")
        with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
            _require_slot(lease, client.status(), order.digest)
            _load(client, settings, order.digest, adapter)
        failpoints.reach("deploy_speculator.loaded")
        if lease.cancelled():
            raise JobCancelled
        _release(lease, order)
        failpoints.reach("deploy_speculator.released")
    except JobCancelled:
        _end_run(lease, order, "cancelled", "cancelled", None)
        raise
    except Broken as error:
        _quarantine(lease, order, str(error))
        raise JobFailed(str(error)) from error
    except (Conflict, NotFound) as error:
        _end_run(lease, order, "failed", "superseded", error.message)
        raise JobFailed(error.message) from error


def _begin(lease: Lease, order: Order) -> str | None:
    """The adapter that the heads were trained on. Raises Conflict when these heads cannot draft for this project."""
    with lease.transaction() as session:
        artifact = deployments.require_own(session, order.project_id, order.digest, "speculator")
        if artifact.state in CONDEMNED:
            raise Conflict(f"heads {order.digest[:12]} are {artifact.state}")
        if not read_config(session.get_one(Project, order.project_id).config).enabled:
            raise Conflict("speculation is switched off for this project")
        trained_on: str | None = artifact.manifest.get("adapter")
        active = deployments.get(session, order.project_id).active_digest
        if trained_on != active:
            names = f"{deployments.short(trained_on)}, and {deployments.short(active)} serves now"
            raise Conflict(f"the heads were trained on {names}")
        if order.run_id is not None:
            runs.enter_phase(session, runs.get(session, order.run_id), "staging")
        return trained_on


def _require_slot(lease: Lease, status: Status, digest: str) -> None:
    """An engine without a free slot would give up heads that another deployment names. Raises Conflict."""
    held = {slot.digest for slot in status.speculators}
    if digest in held or not status.speculators_total:
        return
    with lease.sessions() as session:
        wanted = speculators.read_wanted_heads(session)
    if len(held & wanted.projects.keys()) >= status.speculators_total:
        raise Conflict("no slot is free for these heads: raise WHET_SPECULATOR_SLOTS")


def _load(client: SyncEngineClient, settings: Settings, digest: str, adapter: str | None) -> None:
    """Load, and believe neither silence nor another digest: an engine that drafts with something else says so."""
    try:
        serving = client.load_speculator(digest, str(settings.artifacts / digest))
    except EngineRefused as error:
        if error.transient:
            raise RuntimeError(f"the engine could not load the heads just now: {error}") from error
        if client.status().speculators_total == 0:
            raise Conflict(f"this engine drafts nothing: {error}") from error
        if error.code == "too_large":
            raise Conflict(f"the heads fit no slot of this engine: {error}") from error
        raise Broken(f"the engine refused the heads: {error}") from error
    if serving != digest:
        log.error("the engine drafts with other heads than asked", alarm=True, asked=digest, serving=serving)
        raise RuntimeError(f"the engine answered with heads {serving[:12] or 'of no digest'}")
    _require_adapter(client.status(), digest, adapter)


def _require_adapter(status: Status, digest: str, adapter: str | None) -> None:
    for slot in status.speculators:
        if slot.digest == digest and slot.adapter != adapter:
            raise Broken("the engine reads another adapter from the heads' file than their manifest named")


def _release(lease: Lease, order: Order) -> None:
    """On trial with the project's share; live at once where nothing is to be tried. A repeated job changes nothing."""
    with lease.transaction() as session:
        deployment = deployments.get(session, order.project_id)
        config = read_config(session.get_one(Project, order.project_id).config)
        heads = speculators.heads_of(deployment)
        phase = "canary" if config.canary_share else "live"
        reason = f"run {order.run_id} passed the gate" if order.run_id else "deployed by hand"
        decision = Decision(ACTOR, reason, {"run_id": str(order.run_id) if order.run_id else None})
        if order.digest not in (heads.live, heads.canary):
            if config.canary_share:
                speculators.stage_canary(session, order.project_id, order.digest, config.canary_share, decision)
            else:
                speculators.go_live(session, order.project_id, order.digest, decision)
        if order.run_id is not None:
            runs.finish(session, runs.get(session, order.run_id), "succeeded", phase)
        lease.succeed(session)
    log.info("heads draft", digest=order.digest, phase=phase)


def _quarantine(lease: Lease, order: Order, reason: str) -> None:
    with lease.transaction() as session:
        condemn(session, order.project_id, order.digest, ACTOR, reason)
        if order.run_id is not None:
            runs.finish(session, runs.get(session, order.run_id), "failed", "quarantined", reason)


def condemn(session: Session, project_id: UUID, digest: str, actor: str, reason: str) -> None:
    """Quarantine heads that no engine loads, and stop asking for them where they draft or are tried."""
    heads = speculators.heads_of(deployments.get(session, project_id))
    decision = Decision(actor, reason, {})
    if digest == heads.canary:
        speculators.withdraw_canary(session, project_id, decision, state="quarantined")
    elif digest == heads.live:
        speculators.roll_back(session, project_id, decision, state="quarantined")
    elif session.get_one(Artifact, digest).state not in CONDEMNED:
        deployments.advance(session, digest, "quarantined", actor=actor, reason=reason)


def _end_run(lease: Lease, order: Order, state: Literal["failed", "cancelled"], phase: str, error: str | None) -> None:
    if order.run_id is not None:
        with lease.transaction() as session:
            runs.finish(session, runs.get(session, order.run_id), state, phase, error)
