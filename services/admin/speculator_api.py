"""The admin API's part on speculation: which heads draft, what drafting earns, and a person's decisions."""

from typing import Any

from fastapi import APIRouter

from services.admin import shapes
from services.admin.access import Caller, Trainer
from services.errors import Conflict
from services.store import deployments, drafts, speculators, speed
from services.store.models import Deployment, Project
from services.store.speculation import read_config
from services.store.speculators import Decision

router = APIRouter(prefix="/api/p/{slug}/speculator")


@router.get("")
def show_speculator(caller: Trainer, slug: str) -> dict[str, Any]:
    """The heads, the settings, the last day's figures and the history, newest first."""
    project = caller.project(slug)
    measured = speed.measure(caller.session, project.id)
    events = [row for row in deployments.events(caller.session, project.id) if row.kind.startswith("speculator_")]
    return {
        **_heads(deployments.create(caller.session, project.id)),
        "config": read_config(project.config).model_dump(),
        "gain": measured.gain._asdict() if measured.gain else None,
        "rates": {name: rate._asdict() if rate else None for name, rate in _rates(measured).items()},
        "drafters": [
            {**drafter._asdict(), "per_draft": drafter.per_draft}
            for drafter in drafts.drafting(caller.session, project.id, measured.window).drafters
        ],
        "events": [shapes.deployment_event(event) for event in events],
    }


@router.post("/rollback")
def roll_back(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """From the live heads to the last good ones, else to the suffix drafter; 409 when no heads are live."""
    project = caller.project(slug)
    decision = _decision(caller, project, sent, "rolled back through the API")
    return _heads(speculators.roll_back(caller.session, project.id, decision))


@router.post("/retire")
def retire(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """Leave drafting to the suffix drafter until new heads pass; 409 when it works alone already."""
    project = caller.project(slug)
    decision = _decision(caller, project, sent, "retired through the API")
    return _heads(speculators.retire(caller.session, project.id, decision))


@router.post("/promote")
def promote(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """Make the heads on trial live without waiting for their figures; 409 when none are."""
    project = caller.project(slug)
    canary = deployments.get(caller.session, project.id).speculator_canary_digest
    if canary is None:
        raise Conflict("no heads are being tried")
    decision = _decision(caller, project, sent, "promoted through the API")
    return _heads(speculators.go_live(caller.session, project.id, canary, decision))


@router.post("/withdraw")
def withdraw(caller: Trainer, slug: str, sent: shapes.RollBack) -> dict[str, Any]:
    """End the trial of the heads that are being tried; 409 when none are."""
    project = caller.project(slug)
    decision = _decision(caller, project, sent, "withdrawn through the API")
    return _heads(speculators.withdraw_canary(caller.session, project.id, decision))


def _decision(caller: Caller, project: Project, sent: shapes.RollBack, reason: str) -> Decision:
    """The store compares the row with this look again once it holds it."""
    deployment = deployments.get(caller.session, project.id)
    if sent.generation not in (None, deployment.generation):
        raise Conflict(f"the deployment moved from generation {sent.generation} to {deployment.generation}")
    return Decision(caller.actor, sent.reason.strip() or reason, {}, speculators.see(deployment))


def _heads(row: Deployment) -> dict[str, Any]:
    return {
        "generation": row.generation, "live": row.speculator_digest, "canary": row.speculator_canary_digest,
        "share": row.speculator_share, "last_good": row.speculator_last_good_digest,
    }  # fmt: skip


def _rates(measured: speed.Speed) -> dict[str, speed.Rate | None]:
    return {"drafted": measured.drafted, "plain": measured.plain}
