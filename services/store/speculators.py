"""Which heads a project drafts with: canary, live, last good. Without any, the suffix drafter works alone.

Each change locks the deployment row and, where a decision was made from an older look, compares it with that look.
"""

from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import runs
from services.store.lifecycle import locked, move, record_change, require_own, short
from services.store.models import Artifact, Deployment, DeploymentEvent
from services.store.speculation import Heads

# Stations on the way to traffic, for heads that the gate has passed or that come back.
TOWARDS_STAGED = {"built": ("verified", "staged"), "verified": ("staged",), "retired": ("staged",)}


class Seen(NamedTuple):
    """The row a decision was made from: another generation or other heads since, and it no longer holds."""

    generation: int
    heads: Heads


class Decision(NamedTuple):
    """Who changes the row, why, on what figures, and from which look (None: whatever stands there now)."""

    actor: str
    reason: str
    evidence: dict[str, Any]
    seen: Seen | None = None


class WantedHeads(NamedTuple):
    """The heads deployments name, by digest: whose they are, and the base model they read."""

    projects: dict[str, UUID]
    bases: dict[str, str]


def read_wanted_heads(session: Session) -> WantedHeads:
    """Live heads and those on trial."""
    found = WantedHeads({}, {})
    named = or_(Artifact.digest == Deployment.speculator_digest, Artifact.digest == Deployment.speculator_canary_digest)
    for row in session.execute(
        select(Deployment.project_id, Artifact.digest, Artifact.base_digest).join(Artifact, named)
    ):
        found.projects[row.digest] = row.project_id
        found.bases[row.digest] = row.base_digest
    return found


def heads_of(deployment: Deployment) -> Heads:
    """The heads a row names."""
    return Heads(deployment.speculator_digest, deployment.speculator_canary_digest, deployment.speculator_share)


def see(deployment: Deployment) -> Seen:
    """For a decision that will be carried out later."""
    return Seen(deployment.generation, heads_of(deployment))


def stage_canary(session: Session, project_id: UUID, digest: str, share: float, decision: Decision) -> Deployment:
    """Try heads on `share` of the requests; a canary that is still undecided makes room for them.

    Raises Conflict for another adapter's heads, for heads that serve already or may not serve, and for a stale look.
    """
    deployment = _held(session, project_id, decision)
    _require_fitting(session, deployment, digest)
    if digest in (deployment.speculator_digest, deployment.speculator_canary_digest):
        raise Conflict(f"heads {short(digest)} draft already")
    replaced = deployment.speculator_canary_digest
    if replaced is not None:
        _move(session, replaced, "retired")
        _record(session, deployment, "speculator_retired", replaced, None, _because(decision, "newer heads are tried"))
    _towards_traffic(session, digest, "canary")
    deployment.speculator_canary_digest = digest
    deployment.speculator_share = share
    told = decision._replace(evidence={**decision.evidence, "share": share})
    _record(session, deployment, "speculator_canary", deployment.speculator_digest, digest, told)
    return deployment


def go_live(session: Session, project_id: UUID, digest: str, decision: Decision) -> Deployment:
    """Draft with `digest` for everybody: the canary, or heads that come straight from the gate. What drafted before
    is retired and last good.

    Raises Conflict as `stage_canary`.
    """
    deployment = _held(session, project_id, decision)
    _require_fitting(session, deployment, digest)
    old = deployment.speculator_digest
    if digest == old:
        raise Conflict(f"heads {short(digest)} are live already")
    _towards_traffic(session, digest, "live")
    for other in (old, deployment.speculator_canary_digest):
        if other not in (None, digest):
            _move(session, other, "retired")
    deployment.speculator_digest = digest
    deployment.speculator_last_good_digest = old
    _end_canary(deployment)
    _record(session, deployment, "speculator_live", old, digest, decision)
    return deployment


def withdraw_canary(session: Session, project_id: UUID, decision: Decision, *, state: str = "retired") -> Deployment:
    """Back to what drafted beside the canary. `state` "rolled_back" and "quarantined" say that it must not come back.

    Raises Conflict when there is none, or for a stale look.
    """
    deployment = _held(session, project_id, decision)
    canary = deployment.speculator_canary_digest
    if canary is None:
        raise Conflict("no heads are being tried")
    _move(session, canary, state)
    _end_canary(deployment)
    _record(session, deployment, _kind(state), canary, deployment.speculator_digest, decision)
    return deployment


def roll_back(session: Session, project_id: UUID, decision: Decision, *, state: str = "rolled_back") -> Deployment:
    """From the live heads to the last good ones, or to the suffix drafter; what is left never drafts again.

    Needs only Postgres. Raises Conflict when no heads are live, or for a stale look.
    """
    deployment = _held(session, project_id, decision)
    condemned = deployment.speculator_digest
    if condemned is None:
        raise Conflict("no heads are live: the suffix drafter works alone already")
    target = _usable(session, deployment, deployment.speculator_last_good_digest)
    _move(session, condemned, state)
    if target is not None:
        _move(session, target, "live")
    deployment.speculator_digest = target
    deployment.speculator_last_good_digest = None
    _record(session, deployment, "speculator_rolled_back", condemned, target, decision)
    return deployment


def retire(session: Session, project_id: UUID, decision: Decision) -> Deployment:
    """Leave drafting to the suffix drafter until new heads pass. Raises Conflict when it works alone already."""
    deployment = _held(session, project_id, decision)
    leaving = [digest for digest in heads_of(deployment)[:2] if digest is not None]
    if not leaving:
        raise Conflict("no heads are in use: the suffix drafter works alone already")
    deployment.speculator_digest = None
    deployment.speculator_last_good_digest = None
    _end_canary(deployment)
    for digest in leaving:
        _move(session, digest, "retired")
        _record(session, deployment, "speculator_retired", digest, None, decision)
    return deployment


def retire_heads(session: Session, project_id: UUID, digest: str, decision: Decision) -> None:
    """End the trial of `digest`, or retire it where it is live. Raises Conflict when it drafts no more."""
    heads = heads_of(locked(session, project_id))
    if digest == heads.canary:
        withdraw_canary(session, project_id, decision)
    elif digest == heads.live:
        retire(session, project_id, decision)
    else:
        raise Conflict(f"heads {short(digest)} do not draft any more")


def last_event(session: Session, project_id: UUID, kind: str, digest: str | None) -> DeploymentEvent | None:
    """When and how these heads (None: the suffix drafter) last got there."""
    query = select(DeploymentEvent).where(
        DeploymentEvent.project_id == project_id,
        DeploymentEvent.kind == kind,
        DeploymentEvent.to_digest.is_not_distinct_from(digest),
    )
    return session.scalar(query.order_by(DeploymentEvent.id.desc()).limit(1))


def raise_alarm(session: Session, project_id: UUID, digest: str | None, decision: Decision) -> None:
    """Put into the history that a drafter (None: the suffix drafter) seems broken. Changes nothing else."""
    _record(session, _held(session, project_id, decision), "speculator_alarm", digest, digest, decision)


def _held(session: Session, project_id: UUID, decision: Decision) -> Deployment:
    deployment = locked(session, project_id)
    if decision.seen not in (None, see(deployment)):
        raise Conflict("the deployment or its heads changed since this was decided")
    return deployment


def _require_fitting(session: Session, deployment: Deployment, digest: str) -> None:
    artifact = require_own(session, deployment.project_id, digest, "speculator")
    trained_on = artifact.manifest.get("adapter")
    if trained_on != deployment.active_digest:
        serving = short(deployment.active_digest)
        raise Conflict(f"heads {short(digest)} were trained on {short(trained_on)}, and {serving} serves now")


def _usable(session: Session, deployment: Deployment, digest: str | None) -> str | None:
    """The heads to go back to, as long as they may serve and read the adapter that does."""
    artifact = session.get(Artifact, digest, populate_existing=True) if digest is not None else None
    if artifact is None or artifact.state != "retired" or artifact.tainted_at is not None:
        return None
    return digest if artifact.manifest.get("adapter") == deployment.active_digest else None


def _towards_traffic(session: Session, digest: str, state: str) -> None:
    for station in TOWARDS_STAGED.get(session.get_one(Artifact, digest).state, ()):
        move(session, digest, station)
    _move(session, digest, state)


def _move(session: Session, digest: str, state: str) -> None:
    """A step, and the word for it on the run that trained these heads."""
    move(session, digest, state)
    runs.went_on(session, digest, state.replace("_", " "))


def _end_canary(deployment: Deployment) -> None:
    deployment.speculator_canary_digest = None
    deployment.speculator_share = 0.0


def _kind(state: str) -> str:
    return "speculator_retired" if state == "retired" else "speculator_rolled_back"


def _because(decision: Decision, reason: str) -> Decision:
    return decision._replace(reason=reason, evidence={})


def _record(
    session: Session, deployment: Deployment, kind: str, old: str | None, to: str | None, decision: Decision
) -> None:
    record_change(
        session, deployment, kind, old=old, to=to,
        actor=decision.actor, reason=decision.reason, evidence=decision.evidence,
    )  # fmt: skip
