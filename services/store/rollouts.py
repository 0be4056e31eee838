"""A candidate's way to traffic, as changes of the deployment: shadow, canary, promotion, and the ways out.

Each locks the deployment's row first and, where it was decided from an older look, compares it with that look.
"""

import secrets
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import audit, deployments, jobs, rollout_counts, runs, trials
from services.store.lifecycle import Move, locked, move, record_change, require_own, short
from services.store.models import Deployment, Job, Project, Rollout
from services.store.rollout_config import RolloutConfig

# From these a person may have an artefact deployed; the job verifies it against its own record first.
STARTABLE = ("verified", "staged", "retired")
What = Literal["newest", "canary", "live"]


class Decision(NamedTuple):
    """Who decides, why, on what figures, and from which generation (None: whatever stands there now)."""

    actor: str
    reason: str
    evidence: dict[str, Any]
    generation: int | None = None


def begin(
    session: Session, project_id: UUID, digest: str, config: RolloutConfig, decision: Decision, run_id: UUID | None
) -> Rollout:
    """Put a staged artefact on trial: in the shadow where the project wants that, else as a canary.

    `run_id`: the run that deploys it; by hand, None, it is the one that trained it.
    One that is on trial already and undecided makes room, as it would for any newer candidate. Raises Conflict for a
    stale look, while promotion is frozen, or for an artefact that is not a staged one of this project.
    """
    deployment = _held(session, project_id, decision)
    deployments.require_open(deployment)
    artifact = require_own(session, project_id, digest, "adapter")
    if digest in (deployment.active_digest, deployment.canary_digest):
        raise Conflict(f"{short(digest)} is {'live' if digest == deployment.active_digest else 'on trial'} already")
    _make_room(session, deployment, decision)
    rollout = Rollout(
        project_id=project_id, digest=digest, baseline_digest=deployment.active_digest,
        run_id=run_id or artifact.run_id, stage="shadow", generation=deployment.generation, salt=_salt(),
        config=config.model_dump(mode="json"), share=0.0,
    )  # fmt: skip
    session.add(rollout)
    deployment.canary_digest = digest
    deployment.canary_share = 0.0
    session.flush()
    if not config.shadow.requests:
        return _serve(session, deployment, rollout, decision, config.share)
    # Nothing else answers yet, but whoever looked before has not seen this candidate.
    deployment.generation += 1
    rollout.generation = deployment.generation
    step = move(session, digest, "shadow")
    runs.went_on(session, rollout.digest, "shadow")
    _record(session, deployment, "shadow", None, digest, decision, step, {"requests": config.shadow.requests})
    return rollout


def begin_canary(session: Session, project_id: UUID, decision: Decision) -> Rollout:
    """From the shadow to a share of the users. Raises Conflict when nothing is in the shadow, or for a stale look."""
    deployment = _held(session, project_id, decision)
    deployments.require_open(deployment)
    rollout = _open(session, project_id, "shadow")
    return _serve(session, deployment, rollout, decision, trials.config_of(rollout).share)


def change_share(session: Session, project_id: UUID, share: float, decision: Decision) -> Rollout:
    """Serve another share. Users are drawn anew and the comparison starts over: who served whom is no longer the same.

    Raises Conflict when there is no canary, or for a stale look.
    """
    deployment = _held(session, project_id, decision)
    rollout = _open(session, project_id, "canary")
    if share == rollout.share:
        raise Conflict(f"the canary serves {share:.0%} already")
    decision = decision._replace(evidence={**decision.evidence, **trials.figures(rollout), "before": rollout.share})
    return _serve(session, deployment, rollout, decision, share)


def promote(session: Session, project_id: UUID, decision: Decision) -> Deployment:
    """The candidate on trial goes live. Raises Conflict when there is none, for a stale look, and while frozen."""
    deployment = _held(session, project_id, decision)
    rollout = _open(session, project_id)
    return deployments.flip(
        session, project_id, expected_generation=deployment.generation, digest=rollout.digest, actor=decision.actor,
        reason=decision.reason, evidence={**trials.figures(rollout), **decision.evidence},
    )  # fmt: skip


def end(session: Session, project_id: UUID, stage: str, decision: Decision, *, automatic: bool = False) -> Deployment:
    """Take the candidate off trial: "stopped", "rejected" (by the shadow; both may come back), "rolled_back" or
    "quarantined".

    What is live goes on serving everybody. Needs only Postgres. `automatic` ones count towards a freeze.
    Raises Conflict when there is none, or for a stale look.
    """
    deployment = _held(session, project_id, decision)
    rollout = _open(session, project_id)
    evidence = {**trials.figures(rollout), **decision.evidence, **({"automatic": True} if automatic else {})}
    step = deployments.end_trial(session, deployment, stage, decision.reason)
    deployment.generation += 1
    record_change(
        session, deployment, f"canary_{stage}", old=rollout.digest, to=deployment.active_digest,
        actor=decision.actor, reason=decision.reason, evidence=evidence, moves=[step],
    )  # fmt: skip
    if automatic:
        deployments.count_automatic(session, deployment, decision.actor)
    return deployment


def back(session: Session, project_id: UUID, what: What, decision: Decision) -> Deployment:
    """Undo the newest change: the candidate on trial, or else what is live. Needs only Postgres.

    What is left is condemned, except in the shadow, where it has served nobody. Raises Conflict when there is nothing
    to go back from, or for a stale look.
    """
    deployment = _held(session, project_id, decision)
    rollout = trials.open_of(session, project_id)
    if what == "live" or (what == "newest" and rollout is None):
        return deployments.roll_back(
            session, project_id, actor=decision.actor, reason=decision.reason, evidence=decision.evidence,
            expected_generation=deployment.generation,
        )  # fmt: skip
    stage = "stopped" if rollout is not None and rollout.stage == "shadow" else "rolled_back"
    return end(session, project_id, stage, decision)


def order(session: Session, project: Project, digest: str, decision: Decision) -> Job:
    """Have an artefact deployed by hand: the job loads it, verifies it and puts it on trial as the project wants.

    Raises Conflict for one that may not serve, and while promotion is frozen or another deployment is under way.
    """
    deployments.require_open(_held(session, project.id, decision))
    artifact = require_own(session, project.id, digest, "adapter")
    if artifact.state not in STARTABLE:
        raise Conflict(
            f"artefact {short(digest)} is {artifact.state}; only {', '.join(STARTABLE)} ones can be deployed"
        )
    asked = {"by": decision.actor, "why": decision.reason}
    payload = {"project_id": str(project.id), "digest": digest, "run_id": None, **asked}
    job = jobs.enqueue(session, "deploy", payload, project_id=project.id, dedupe_key=f"deploy:{project.id}")
    detail = {"digest": digest, "reason": decision.reason}
    audit.record(session, decision.actor, "deployment.order", f"project:{project.id}", detail)
    return job


def _serve(session: Session, deployment: Deployment, rollout: Rollout, decision: Decision, share: float) -> Rollout:
    """Route a share of the users to the candidate, drawn with a new salt, and count from nothing.

    Raises Conflict for one that was trained on what has been erased since: it serves nobody anew.
    """
    require_own(session, deployment.project_id, rollout.digest, "adapter")
    step = move(session, rollout.digest, "canary")
    trials.forget_counts(session, rollout)
    deployment.generation += 1
    deployment.canary_share = share
    rollout.stage = "canary"
    rollout.share = share
    rollout.salt = _salt()
    rollout.generation = deployment.generation
    rollout.canary_at = datetime.now(UTC)
    runs.went_on(session, rollout.digest, "canary")
    rollout.folded_until = rollout.looked_at = None
    rollout.verdict, rollout.track = {}, []
    rollout.reference = dict(rollout_counts.reference(session, deployment.project_id, deployment.active_digest))
    _record(
        session, deployment, "canary", deployment.active_digest, rollout.digest, decision, step, {"share": share}
    )  # fmt: skip
    return rollout


def _make_room(session: Session, deployment: Deployment, decision: Decision) -> None:
    replaced = deployment.canary_digest
    rollout = trials.open_of(session, deployment.project_id, lock=True)
    if replaced is None or rollout is None:
        return
    reason = f"a newer candidate came before this one was decided on: {decision.reason}"
    evidence = trials.figures(rollout)
    step = deployments.end_trial(session, deployment, "superseded", reason)
    record_change(
        session, deployment, "canary_superseded", old=replaced, to=deployment.active_digest, actor=decision.actor,
        reason=reason, evidence=evidence, moves=[step],
    )  # fmt: skip


def _held(session: Session, project_id: UUID, decision: Decision) -> Deployment:
    deployment = locked(session, project_id)
    deployments.require_generation(deployment, decision.generation)
    return deployment


def _open(session: Session, project_id: UUID, stage: str | None = None) -> Rollout:
    rollout = trials.open_of(session, project_id, lock=True)
    if rollout is None or stage not in (None, rollout.stage):
        raise Conflict({"shadow": "nothing is in the shadow"}.get(stage or "", "no candidate is on trial"))
    return rollout


def _record(
    session: Session,
    deployment: Deployment,
    kind: str,
    old: str | None,
    to: str,
    decision: Decision,
    step: Move | None,
    evidence: dict[str, Any],
) -> None:
    record_change(
        session, deployment, kind, old=old, to=to, actor=decision.actor, reason=decision.reason,
        evidence={**decision.evidence, **evidence}, moves=[step],
    )  # fmt: skip


def _salt() -> str:
    """Fresh for every canary and every share: the same users must not be the first to try everything."""
    return secrets.token_hex(16)
