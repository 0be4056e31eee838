"""The admin API's part on rollout: the candidate on trial, a person's decisions on it, the way back, the freeze."""

from typing import Any

from fastapi import APIRouter

from services.admin import shapes
from services.admin.access import Caller, Trainer
from services.errors import InvalidRequest
from services.store import deployments, engine_reports, rollouts, trials
from services.store.rollout_config import read_rollout
from services.store.rollouts import Decision

router = APIRouter(prefix="/api/p/{slug}/deployment")


@router.get("/rollout")
def show_rollout(caller: Trainer, slug: str) -> dict[str, Any]:
    """The candidate on trial or the last one, the project's settings, and what each engine has loaded."""
    project = caller.project(slug)
    latest = trials.latest(caller.session, project.id)
    reports = engine_reports.of_project(caller.session, project.id)
    return {
        **shapes.deployment(deployments.create(caller.session, project.id)),
        "config": read_rollout(project.config).model_dump(mode="json"),
        "rollout": shapes.rollout(latest) if latest else None,
        "engines": [
            {
                "engine": one.engine, "generation": one.generation, "digests": one.digests,
                "seen_at": shapes.moment(one.seen_at),
            }
            for one in reports
        ],
    }  # fmt: skip


@router.post("/rollback")
def roll_back(caller: Trainer, slug: str, sent: shapes.Back) -> dict[str, Any]:
    """Undo the newest change: end the canary, or go back to the last good weights.

    409 when there is nothing to go back from or `generation` has moved. Needs only the database.
    """
    decision = _decision(caller, sent, "rolled back through the API")
    return shapes.deployment(rollouts.back(caller.session, caller.project(slug).id, sent.what, decision))


@router.post("/promote")
def promote(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """Make the candidate on trial live without waiting for its figures, and say why.

    409 when there is none, and while frozen.
    """
    decision = _decision(caller, sent)
    return shapes.deployment(rollouts.promote(caller.session, caller.project(slug).id, decision))


@router.post("/canary/begin")
def begin_canary(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """From the shadow to a share of the users without waiting for the rest; 409 when nothing is in the shadow."""
    project = caller.project(slug)
    rollouts.begin_canary(caller.session, project.id, _decision(caller, sent, "begun through the API"))
    return shapes.deployment(deployments.get(caller.session, project.id))


@router.post("/canary/stop")
def stop(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """Take the candidate off trial; it is retired and may be tried again. 409 when there is none."""
    decision = _decision(caller, sent, "stopped through the API")
    return shapes.deployment(rollouts.end(caller.session, caller.project(slug).id, "stopped", decision))


@router.post("/canary/share")
def change_share(caller: Trainer, slug: str, sent: shapes.Share) -> dict[str, Any]:
    """Serve another share of the users; the comparison starts over. 409 when there is no canary."""
    project = caller.project(slug)
    rollouts.change_share(
        caller.session, project.id, sent.share, _decision(caller, sent, "share changed through the API")
    )
    return shapes.deployment(deployments.get(caller.session, project.id))


@router.post("/start", status_code=202)
def start(caller: Trainer, slug: str, sent: shapes.Start) -> dict[str, Any]:
    """Have an artefact deployed that passed the gate before; 409 for one that may not serve."""
    decision = _decision(caller, sent, "deployed through the API")
    return shapes.job(rollouts.order(caller.session, caller.project(slug), sent.digest, decision))


@router.post("/looked")
def looked(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """A person has looked at the automatic roll-backs and says what they saw: promotion is open again.

    409 when it is not frozen.
    """
    decision = _decision(caller, sent)
    after = deployments.unfreeze(
        caller.session, caller.project(slug).id, actor=decision.actor, reason=decision.reason,
        expected_generation=decision.generation,
    )  # fmt: skip
    return shapes.deployment(after)


def _decision(caller: Caller, sent: shapes.RollBack, reason: str | None = None) -> Decision:
    """Without a default somebody has to say why."""
    said = sent.reason.strip() or reason
    if said is None:
        raise InvalidRequest("say why: it is kept in the history", param="reason")
    return Decision(caller.actor, said, {}, sent.generation)
