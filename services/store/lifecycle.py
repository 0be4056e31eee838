"""The life of an artefact: one table of states, and the only functions that move along it, each step with its event.

Events are the deployment's: its history tells everything that ever happened to what a project serves or might serve.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import audit, webhooks
from services.store.models import Artifact, Deployment, DeploymentEvent

# Training has no row yet, its run has. Shadow is passed over where nobody asked for it, the canary where a project
# swaps directly. A retired artefact comes back when a roll-back returns to it, or when somebody deploys it again.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "training": frozenset({"built"}),
    "built": frozenset({"verified", "rejected", "quarantined"}),
    "verified": frozenset({"staged", "rejected", "quarantined"}),
    "staged": frozenset({"shadow", "canary", "live", "rejected", "quarantined"}),
    "shadow": frozenset({"canary", "live", "retired", "quarantined"}),
    "canary": frozenset({"live", "retired", "quarantined", "rolled_back"}),
    "live": frozenset({"retired", "quarantined", "rolled_back"}),
    "retired": frozenset({"staged", "live", "quarantined"}),
    "rejected": frozenset(),
    "quarantined": frozenset(),
    "rolled_back": frozenset(),
}
WHY: Mapping[str, str] = {
    "built": "written, and named by its digest",
    "verified": "passed the gate",
    "staged": "loaded into a spare slot of the engine",
    "rejected": "not shown to be better, or worse somewhere",
    "quarantined": "the artefact is at fault",
}
HEADS_PASSED = "what they draft is accepted often enough to be tried on traffic"
# What is in one of these never goes live again.
CONDEMNED = ("rejected", "quarantined", "rolled_back")
# Marks, among an event's evidence, which artefacts changed state with it.
STATES = "states"


class Move(NamedTuple):
    """One artefact's step from state to state."""

    digest: str
    old: str
    new: str


def move(session: Session, digest: str, state: str) -> Move | None:
    """Take a step along the table, without its event: the caller records that. None where it stands there already.

    Raises NotFound, Conflict.
    """
    artifact = _held(session, digest)
    if artifact.state == state:
        return None
    if state not in TRANSITIONS[artifact.state]:
        raise Conflict(f"artefact {digest[:12]} is {artifact.state} and cannot become {state}")
    step = Move(digest, artifact.state, state)
    artifact.state = state
    session.flush()
    if state in CONDEMNED:
        mend_last_good(session, [digest])
    return step


def advance(
    session: Session,
    digest: str,
    state: str,
    *,
    actor: str = "whet",
    reason: str = "",
    evidence: dict[str, Any] | None = None,
) -> Artifact:
    """A step that is an event of its own; staying where it is changes nothing. Raises NotFound, Conflict."""
    step = move(session, digest, state)
    artifact = session.get_one(Artifact, digest)
    if step is not None:
        why = HEADS_PASSED if (artifact.kind, state) == ("speculator", "verified") else WHY.get(state, state)
        tell(session, artifact, step, actor=actor, reason=reason or why, evidence=evidence)
    return artifact


def born(session: Session, artifact: Artifact, *, actor: str = "whet") -> None:
    """The event of an artefact whose row has just been written."""
    step = Move(artifact.digest, "training", artifact.state)
    found = {"run_id": str(artifact.run_id)} if artifact.run_id else {}
    tell(session, artifact, step, actor=actor, reason=WHY["built"], evidence=found)


def tell(
    session: Session,
    artifact: Artifact,
    step: Move,
    *,
    actor: str,
    reason: str,
    evidence: dict[str, Any] | None = None,
) -> None:
    """Append the event of a step that changes nothing in the deployment's row."""
    generation = select(Deployment.generation).where(Deployment.project_id == artifact.project_id)
    kind = step.new if artifact.kind == "adapter" else f"speculator_{step.new}"
    session.add(
        DeploymentEvent(
            project_id=artifact.project_id, kind=kind, generation=session.scalar(generation) or 1,
            from_digest=None, to_digest=artifact.digest, actor=actor, reason=reason,
            evidence={**(evidence or {}), **stated([step])},
        )
    )  # fmt: skip
    session.flush()


def stated(moves: Iterable[Move | None]) -> dict[str, Any]:
    """The part of an event's evidence that says which artefacts changed state."""
    made = [list(step) for step in moves if step is not None]
    return {STATES: made} if made else {}


def locked(session: Session, project_id: UUID) -> Deployment:
    """The deployment's row, held until the transaction ends. Raises NotFound."""
    deployment = session.get(Deployment, project_id, with_for_update=True, populate_existing=True)
    if deployment is None:
        raise NotFound(f"no deployment for project {project_id}")
    return deployment


def way_back(session: Session, project_id: UUID, digest: str | None) -> str | None:
    """Where a roll-back of `digest` goes: what it replaced, else what that had replaced, the first that may serve.

    None is the base. Weights on trial are undecided, and those trained on what has been erased since serve nobody anew.
    """
    may_serve = Artifact.state.in_(("retired", "staged")) & Artifact.tainted_at.is_(None)
    flips = session.execute(
        select(DeploymentEvent.from_digest, DeploymentEvent.to_digest, may_serve)
        .outerjoin(Artifact, Artifact.digest == DeploymentEvent.from_digest)
        .where(DeploymentEvent.project_id == project_id, DeploymentEvent.kind == "flip")
        .order_by(DeploymentEvent.id.desc())
    )
    for replaced, by, usable in flips:
        if by != digest:
            continue
        if replaced is None or usable:
            return replaced
        digest = replaced
    return None


def mend_last_good(session: Session, digests: Collection[str]) -> None:
    """Gateways fall back to the last good weights, so these, condemned or tainted, are last good nowhere any more."""
    named = select(Deployment).where(Deployment.last_good_digest.in_(digests)).with_for_update()
    for deployment in session.scalars(named.execution_options(populate_existing=True)).all():
        deployment.last_good_digest = way_back(session, deployment.project_id, deployment.active_digest)
    session.flush()


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
    moves: Iterable[Move | None] = (),
) -> DeploymentEvent:
    """What every change of the row ends with: its time, its event and its line in the audit log."""
    session.flush()
    session.execute(
        update(Deployment).where(Deployment.project_id == deployment.project_id).values(updated_at=func.now())
    )
    event = DeploymentEvent(
        project_id=deployment.project_id, kind=kind, generation=deployment.generation, from_digest=old,
        to_digest=to, actor=actor, reason=reason, evidence={**(evidence or {}), **stated(moves)},
    )  # fmt: skip
    session.add(event)
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
    return event


def short(digest: str | None) -> str:
    """How sentences name weights."""
    return "the base" if digest is None else digest[:12]


def _held(session: Session, digest: str) -> Artifact:
    artifact = session.get(Artifact, digest, with_for_update=True, populate_existing=True)
    if artifact is None:
        raise NotFound(f"no artefact {digest}")
    return artifact
