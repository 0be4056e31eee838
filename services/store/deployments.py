"""Which digests a project serves: changed only by compare-and-set on `generation`, each change with its event.

Writers lock the deployment row first, so two of them never interleave; readers of an old generation get Conflict.
The generation counts the weights that answer. Heads change no answer, so `speculators` leaves it alone; but they draft
for one adapter only, so a change of adapter here takes its heads with it.
"""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import ScalarSelect, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import audit, jobs, pins, webhooks
from services.store.models import Artifact, Deployment, DeploymentEvent

# Marks the event of heads that went because their adapter did, and may come back with it.
LEFT_WITH_ADAPTER = "left_with_adapter"
# The life of an artefact. Training has no row yet; a retired one comes back when a roll-back returns to it.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "built": frozenset({"verified", "rejected", "quarantined"}),
    "verified": frozenset({"staged", "rejected", "quarantined"}),
    "staged": frozenset({"canary", "live", "rejected", "quarantined"}),
    "canary": frozenset({"live", "retired", "rejected", "quarantined", "rolled_back"}),
    "live": frozenset({"retired", "quarantined", "rolled_back"}),
    "retired": frozenset({"staged", "live", "quarantined"}),
    "rejected": frozenset(),
    "quarantined": frozenset(),
    "rolled_back": frozenset(),
}


def create(session: Session, project_id: UUID) -> Deployment:
    """The row every project has, serving the base; an existing one is left as it is."""
    session.execute(insert(Deployment).values(project_id=project_id, generation=1).on_conflict_do_nothing())
    return get(session, project_id)


def get(session: Session, project_id: UUID) -> Deployment:
    """The deployment as committed. Raises NotFound."""
    deployment = session.get(Deployment, project_id, populate_existing=True)
    if deployment is None:
        raise NotFound(f"no deployment for project {project_id}")
    return deployment


def events(session: Session, project_id: UUID, *, limit: int = 100) -> list[DeploymentEvent]:
    """The history, newest first."""
    query = select(DeploymentEvent).where(DeploymentEvent.project_id == project_id)
    return list(session.scalars(query.order_by(DeploymentEvent.id.desc()).limit(limit)))


def advance(session: Session, digest: str, state: str) -> Artifact:
    """Move an artefact along the table above; staying where it is changes nothing. Raises NotFound, Conflict."""
    artifact = session.get(Artifact, digest, with_for_update=True, populate_existing=True)
    if artifact is None:
        raise NotFound(f"no artefact {digest}")
    if artifact.state != state:
        if state not in TRANSITIONS[artifact.state]:
            raise Conflict(f"artefact {digest[:12]} is {artifact.state} and cannot become {state}")
        artifact.state = state
        session.flush()
    return artifact


def override(session: Session, digest: str, *, actor: str, reason: str) -> Artifact:
    """Let an artefact through that the gate rejected: the one way out of `rejected`, by a person, on record.

    Raises NotFound, and Conflict for one that is not rejected or was trained on data erased since.
    """
    artifact = session.get(Artifact, digest, with_for_update=True, populate_existing=True)
    if artifact is None:
        raise NotFound(f"no artefact {digest}")
    deployment = locked(session, artifact.project_id)
    require_own(session, artifact.project_id, digest, "adapter")
    if artifact.state != "rejected":
        raise Conflict(f"artefact {short(digest)} is {artifact.state}: there is no refusal to override")
    artifact.state = "verified"
    record_change(session, deployment, "override", old=deployment.active_digest, to=digest, actor=actor, reason=reason)
    return artifact


def flip(
    session: Session,
    project_id: UUID,
    *,
    expected_generation: int,
    digest: str | None,
    actor: str,
    reason: str,
    evidence: dict[str, Any] | None = None,
) -> Deployment:
    """Serve `digest` (None: the base) from now on; it becomes live, what served before is retired and last good.

    Raises Conflict when the generation moved, promotion is frozen, or the artefact is not a staged one of this project.
    """
    deployment = locked(session, project_id)
    if deployment.generation != expected_generation:
        raise Conflict(f"the deployment moved from generation {expected_generation} to {deployment.generation}")
    if deployment.frozen:
        raise Conflict("promotion is frozen after automatic roll-backs: a person has to look first")
    if digest == deployment.active_digest:
        raise Conflict(f"{short(digest)} is already live")
    old = deployment.active_digest
    if digest is not None:
        require_own(session, project_id, digest, "adapter")
        advance(session, digest, "live")
    if old is not None:
        advance(session, old, "retired")
    return _commit_change(
        session, deployment, to=digest, last_good=old, kind="flip", actor=actor, reason=reason, evidence=evidence
    )


def roll_back(
    session: Session,
    project_id: UUID,
    *,
    actor: str,
    reason: str,
    expected_generation: int | None = None,
    condemned_state: str = "rolled_back",
) -> Deployment:
    """Return to the last good digest, or to the base when there is none that may serve. Needs only Postgres.

    The artefact it leaves is condemned: it never goes live again. Raises Conflict when the base serves already, or
    when `expected_generation` is given and has moved.
    """
    deployment = locked(session, project_id)
    if expected_generation not in (None, deployment.generation):
        raise Conflict(f"the deployment moved from generation {expected_generation} to {deployment.generation}")
    condemned = deployment.active_digest
    if condemned is None:
        raise Conflict("the base model serves already: there is nothing to roll back")
    target = _untainted(session, deployment.last_good_digest)
    advance(session, condemned, condemned_state)
    if target is not None:
        advance(session, target, "live")
    return _commit_change(
        session,
        deployment,
        to=target,
        last_good=_predecessor(session, project_id, target),
        kind="roll_back",
        actor=actor,
        reason=reason,
        evidence=None,
    )


def _untainted(session: Session, digest: str | None) -> str | None:
    """Weights trained on what has been erased since are deployed nowhere anew, not even by a roll-back."""
    artifact = session.get(Artifact, digest, populate_existing=True) if digest else None
    return digest if artifact is not None and artifact.tainted_at is None else None


def locked(session: Session, project_id: UUID) -> Deployment:
    """The row, held until the transaction ends. Raises NotFound."""
    deployment = session.get(Deployment, project_id, with_for_update=True, populate_existing=True)
    if deployment is None:
        raise NotFound(f"no deployment for project {project_id}")
    return deployment


def require_own(session: Session, project_id: UUID, digest: str, kind: str) -> Artifact:
    """An artefact of this project and kind. Raises Conflict."""
    artifact = session.get(Artifact, digest, populate_existing=True)
    if artifact is None or artifact.project_id != project_id:
        raise Conflict(f"artefact {short(digest)} does not belong to this project")
    if artifact.kind != kind:
        raise Conflict(f"artefact {short(digest)} is of kind {artifact.kind}, not {kind}")
    if artifact.tainted_at is not None:
        raise Conflict(f"artefact {short(digest)} was trained on data that has been erased since: train again")
    return artifact


def record_change(
    session: Session,
    deployment: Deployment,
    kind: str,
    *,
    old: str | None,
    to: str | None,
    actor: str,
    reason: str,
    evidence: dict[str, Any] | None = None,
) -> None:
    """What every change of the row ends with: its time, its event and its line in the audit log."""
    session.flush()
    session.execute(
        update(Deployment).where(Deployment.project_id == deployment.project_id).values(updated_at=func.now())
    )
    session.add(
        DeploymentEvent(
            project_id=deployment.project_id, kind=kind, generation=deployment.generation, from_digest=old,
            to_digest=to, actor=actor, reason=reason, evidence=evidence or {},
        )
    )  # fmt: skip
    session.flush()
    if kind in webhooks.ROLL_BACKS:
        webhooks.rolled_back(
            session, deployment.project_id, kind=kind, generation=deployment.generation, old=old, to=to, reason=reason
        )
    audit.record(
        session,
        actor,
        f"deployment.{kind}",
        f"project:{deployment.project_id}",
        {"generation": deployment.generation, "from": old, "to": to, "reason": reason},
    )


def short(digest: str | None) -> str:
    """How sentences name weights."""
    return "the base" if digest is None else digest[:12]


def _predecessor(session: Session, project_id: UUID, digest: str | None) -> str | None:
    """What `digest` replaced when it went live, if that may still serve; the next roll-back goes there."""
    if digest is None:
        return None
    replaced = (
        select(DeploymentEvent.from_digest)
        .where(
            DeploymentEvent.project_id == project_id,
            DeploymentEvent.to_digest == digest,
            DeploymentEvent.kind == "flip",
        )
        .order_by(DeploymentEvent.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    kept = select(Artifact.digest).where(
        Artifact.digest == replaced, Artifact.state == "retired", Artifact.tainted_at.is_(None)
    )
    return session.scalar(kept)


def _commit_change(
    session: Session,
    deployment: Deployment,
    *,
    to: str | None,
    last_good: str | None,
    kind: str,
    actor: str,
    reason: str,
    evidence: dict[str, Any] | None,
) -> Deployment:
    old = deployment.active_digest
    deployment.active_digest = to
    deployment.last_good_digest = last_good
    deployment.canary_digest = None
    deployment.canary_share = 0.0
    deployment.generation += 1
    record_change(session, deployment, kind, old=old, to=to, actor=actor, reason=reason, evidence=evidence)
    _change_heads(session, deployment, old, actor)
    _ask_for_pins(session, deployment)
    return deployment


def _ask_for_pins(session: Session, deployment: Deployment) -> None:
    """Pinned answers that other weights had learned serve again at once; a job then asks what the new ones know."""
    project_id, active = deployment.project_id, deployment.active_digest
    pins.weights_changed(session, project_id, active)
    if active is not None and pins.any_live(session, project_id):
        payload = {"project_id": str(project_id), "digest": active, "generation": deployment.generation}
        dedupe_key = f"pins.check:{project_id}:{deployment.generation}"
        jobs.enqueue(session, "pins.check", payload, project_id=project_id, dedupe_key=dedupe_key)


def _change_heads(session: Session, deployment: Deployment, old: str | None, actor: str) -> None:
    """Heads read one adapter's states: those of the old one are retired, those the new one had before come back."""
    new = deployment.active_digest
    leaving = [digest for digest in (deployment.speculator_digest, deployment.speculator_canary_digest) if digest]
    returning = _heads_left(session, deployment.project_id, new)
    deployment.speculator_digest = returning
    deployment.speculator_canary_digest = None
    deployment.speculator_share = 0.0
    deployment.speculator_last_good_digest = None
    for digest in leaving:
        advance(session, digest, "retired")
        reason = f"trained on {short(old)}, and {short(new)} serves now"
        evidence = {"adapter": old, "serves": new, LEFT_WITH_ADAPTER: True}
        record_change(
            session, deployment, "speculator_retired", old=digest, to=returning,
            actor=actor, reason=reason, evidence=evidence,
        )  # fmt: skip
    if returning is not None:
        advance(session, returning, "live")
        reason = f"{short(new)}, which they were trained on, serves again"
        record_change(
            session, deployment, "speculator_live", old=leaving[0] if leaving else None, to=returning,
            actor=actor, reason=reason, evidence={"adapter": new},
        )  # fmt: skip


def _heads_left(session: Session, project_id: UUID, adapter: str | None) -> str | None:
    """The heads that were retired last with this adapter, unless a person or the figures retired them."""
    newest = session.execute(
        select(DeploymentEvent.from_digest, DeploymentEvent.evidence)
        .join(Artifact, Artifact.digest == DeploymentEvent.from_digest)
        .where(
            DeploymentEvent.project_id == project_id,
            DeploymentEvent.kind == "speculator_retired",
            DeploymentEvent.from_digest == _last_live(project_id, adapter),
            Artifact.state == "retired",
            Artifact.tainted_at.is_(None),
        )
        .order_by(DeploymentEvent.id.desc())
        .limit(1)
    ).one_or_none()
    return newest.from_digest if newest and newest.evidence.get(LEFT_WITH_ADAPTER) else None


def _last_live(project_id: UUID, adapter: str | None) -> ScalarSelect[str | None]:
    """The heads of an adapter that went live last; a canary that never did is not worth coming back."""
    return (
        select(DeploymentEvent.to_digest)
        .join(Artifact, Artifact.digest == DeploymentEvent.to_digest)
        .where(
            DeploymentEvent.project_id == project_id,
            # A roll-back makes heads live as well: those it went back to.
            DeploymentEvent.kind.in_(("speculator_live", "speculator_rolled_back")),
            Artifact.manifest["adapter"].as_string().is_not_distinct_from(adapter),
        )
        .order_by(DeploymentEvent.id.desc())
        .limit(1)
        .scalar_subquery()
    )
