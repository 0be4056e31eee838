"""What a change of adapter does to the heads: they read one adapter's states, so they go and come back with it."""

from uuid import UUID

from sqlalchemy import ScalarSelect, select
from sqlalchemy.orm import Session

from services.store import runs
from services.store.lifecycle import move, record_change, short
from services.store.models import Artifact, Deployment, DeploymentEvent

# Marks the event of heads that went because their adapter did, and may come back with it.
LEFT_WITH_ADAPTER = "left_with_adapter"


def follow(session: Session, deployment: Deployment, old: str | None, actor: str) -> None:
    """Heads read one adapter's states: those of the old one are retired, those the new one had before come back."""
    new = deployment.active_digest
    leaving = [digest for digest in (deployment.speculator_digest, deployment.speculator_canary_digest) if digest]
    returning = _heads_left(session, deployment.project_id, new)
    deployment.speculator_digest = returning
    deployment.speculator_canary_digest = None
    deployment.speculator_share = 0.0
    deployment.speculator_last_good_digest = None
    for digest in leaving:
        step = move(session, digest, "retired")
        runs.went_on(session, digest, "retired")
        reason = f"trained on {short(old)}, and {short(new)} serves now"
        evidence = {"adapter": old, "serves": new, LEFT_WITH_ADAPTER: True}
        record_change(
            session, deployment, "speculator_retired", old=digest, to=returning,
            actor=actor, reason=reason, evidence=evidence, moves=[step],
        )  # fmt: skip
    if returning is not None:
        step = move(session, returning, "live")
        runs.went_on(session, returning, "live")
        reason = f"{short(new)}, which they were trained on, serves again"
        record_change(
            session, deployment, "speculator_live", old=leaving[0] if leaving else None, to=returning,
            actor=actor, reason=reason, evidence={"adapter": new}, moves=[step],
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
