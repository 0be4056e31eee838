"""Which digests a project serves: changed only by compare-and-set on `generation`, each change with its event.

Writers lock the deployment row first, so two of them never interleave; readers of an old generation get Conflict.
The generation counts what may answer: the live weights, a candidate beside them, its share. Heads change no answer, so
`speculators` leaves it alone; but they draft for one adapter only, so a change of adapter here takes its heads with it.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import head_changes, jobs, pins, runs, trials
from services.store.lifecycle import TRANSITIONS as TRANSITIONS
from services.store.lifecycle import Move, move
from services.store.lifecycle import advance as advance
from services.store.lifecycle import locked as locked
from services.store.lifecycle import record_change as record_change
from services.store.lifecycle import require_own as require_own
from services.store.lifecycle import short as short
from services.store.lifecycle import way_back as way_back
from services.store.models import Artifact, Deployment, DeploymentEvent, Project
from services.store.rollout_config import read_rollout

# An engine that is there loads an adapter within seconds; one that cannot for so long leaves requests unanswered.
PROBE = timedelta(seconds=120)


class Frozen(Conflict):
    """Promotion is frozen: what was to go on waits as it is, until a person has looked."""


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


def override(session: Session, digest: str, *, actor: str, reason: str, evidence: dict[str, Any]) -> Artifact:
    """Let an artefact through that the gate rejected: the one way out of `rejected`, by a person, on record; `evidence`
    is the gate's.

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
    record_change(
        session, deployment, "override", old=deployment.active_digest, to=digest, actor=actor, reason=reason,
        evidence=evidence, moves=[Move(digest, "rejected", "verified")],
    )  # fmt: skip
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
    require_generation(deployment, expected_generation)
    require_open(deployment)
    if digest == deployment.active_digest:
        raise Conflict(f"{short(digest)} is already live")
    old = deployment.active_digest
    moves = []
    if digest is not None:
        require_own(session, project_id, digest, "adapter")
        moves.append(_move(session, digest, "live"))
    if old is not None:
        moves.append(_move(session, old, "retired"))
    deployment.probe_until = None if digest is None else datetime.now(UTC) + PROBE
    return _commit_change(
        session, deployment, to=digest, last_good=old, kind="flip", actor=actor, reason=reason, evidence=evidence,
        moves=moves,
    )  # fmt: skip


def roll_back(
    session: Session,
    project_id: UUID,
    *,
    actor: str,
    reason: str,
    expected_generation: int | None = None,
    condemned_state: str = "rolled_back",
    automatic: bool = False,
    evidence: dict[str, Any] | None = None,
) -> Deployment:
    """Return to the last good digest, or to the base when there is none that may serve. Needs only Postgres.

    The artefact it leaves is condemned: it never goes live again; a canary beside it ends. `automatic` ones count
    towards a freeze. Raises Conflict when the base serves already, or when `expected_generation` is given and moved.
    """
    deployment = locked(session, project_id)
    require_generation(deployment, expected_generation)
    condemned = deployment.active_digest
    if condemned is None:
        raise Conflict("the base model serves already: there is nothing to roll back")
    target = way_back(session, project_id, condemned)
    moves = [_move(session, condemned, condemned_state)]
    if target is not None:
        moves.append(_move(session, target, "live"))
    deployment.probe_until = None
    _commit_change(
        session, deployment, to=target, last_good=way_back(session, project_id, target), kind="roll_back",
        actor=actor, reason=reason, evidence={**(evidence or {}), **({"automatic": True} if automatic else {})},
        moves=moves,
    )  # fmt: skip
    if automatic:
        count_automatic(session, deployment, actor)
    return deployment


def count_automatic(session: Session, deployment: Deployment, actor: str) -> None:
    """So many roll-backs that nobody asked for, and promotion is frozen until a person has looked."""
    config = read_rollout(session.get_one(Project, deployment.project_id).config)
    deployment.automatic_rollbacks += 1
    if deployment.frozen or deployment.automatic_rollbacks < config.freeze_after:
        session.flush()
        return
    deployment.frozen = True
    reason = f"{deployment.automatic_rollbacks} automatic roll-backs since somebody last looked"
    record_change(
        session, deployment, "frozen", old=deployment.active_digest, to=deployment.active_digest, actor=actor,
        reason=reason, evidence={"automatic_rollbacks": deployment.automatic_rollbacks},
    )  # fmt: skip


def unfreeze(
    session: Session, project_id: UUID, *, actor: str, reason: str, expected_generation: int | None = None
) -> Deployment:
    """A person has looked: promotion is open again, and automatic roll-backs are counted anew. Raises Conflict."""
    deployment = locked(session, project_id)
    require_generation(deployment, expected_generation)
    if not deployment.frozen:
        raise Conflict("promotion is not frozen")
    deployment.frozen = False
    deployment.automatic_rollbacks = 0
    record_change(
        session, deployment, "looked", old=deployment.active_digest, to=deployment.active_digest, actor=actor,
        reason=reason,
    )  # fmt: skip
    return deployment


def confirm(session: Session, project_id: UUID, generation: int) -> bool:
    """An engine serves what went live with this generation, so nothing has to be rolled back for want of it."""
    deployment = locked(session, project_id)
    if deployment.generation != generation or deployment.probe_until is None:
        return False
    deployment.probe_until = None
    session.flush()
    return True


def require_generation(deployment: Deployment, expected: int | None) -> None:
    """Raises Conflict when the row has moved since the look a change was decided on."""
    if expected not in (None, deployment.generation):
        raise Conflict(f"the deployment moved from generation {expected} to {deployment.generation}")


def require_open(deployment: Deployment) -> None:
    """Raises Frozen."""
    if deployment.frozen:
        raise Frozen("promotion is frozen after automatic roll-backs: a person has to look first")


def is_frozen(session: Session, project_id: UUID) -> bool:
    """Whether what passes the gate now would have to wait for a person."""
    return bool(session.scalar(select(Deployment.frozen).where(Deployment.project_id == project_id)))


def _move(session: Session, digest: str, state: str) -> Move | None:
    """A step, and the word for it on the run that trained these weights."""
    step = move(session, digest, state)
    runs.went_on(session, digest, state.replace("_", " "))
    return step


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
    moves: Iterable[Move | None],
) -> Deployment:
    old = deployment.active_digest
    ended = end_trial(session, deployment, "promoted" if to == deployment.canary_digest else "superseded", reason)
    deployment.active_digest = to
    deployment.last_good_digest = last_good
    deployment.generation += 1
    record_change(
        session, deployment, kind, old=old, to=to, actor=actor, reason=reason, evidence=evidence,
        moves=[*moves, ended],
    )  # fmt: skip
    head_changes.follow(session, deployment, old, actor)
    _ask_for_pins(session, deployment)
    return deployment


def end_trial(session: Session, deployment: Deployment, stage: str, reason: str) -> Move | None:
    """Take the candidate off the row and close its trial; returns its step. Nothing where there is none."""
    digest = deployment.canary_digest
    if digest is None:
        return None
    deployment.canary_digest = None
    deployment.canary_share = 0.0
    rollout = trials.open_of(session, deployment.project_id, lock=True)
    if rollout is not None:
        trials.close(session, rollout, stage, reason)
    return move(session, digest, trials.STATE_OF_ENDING[stage])


def _ask_for_pins(session: Session, deployment: Deployment) -> None:
    """Pinned answers that other weights had learned serve again at once; a job then asks what the new ones know."""
    project_id, active = deployment.project_id, deployment.active_digest
    pins.weights_changed(session, project_id, active)
    if active is not None and pins.any_live(session, project_id):
        payload = {"project_id": str(project_id), "digest": active, "generation": deployment.generation}
        dedupe_key = f"pins.check:{project_id}:{deployment.generation}"
        jobs.enqueue(session, "pins.check", payload, project_id=project_id, dedupe_key=dedupe_key)
