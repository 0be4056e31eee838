"""What a project serves now, what is on trial beside it, and how it came to."""

from typing import Any

from fastapi import APIRouter, Request, Response

from services.console.access import Here, Viewer
from services.console.earned_view import context as earned_context
from services.console.rollout_view import context as rollout_context
from services.console.speed_view import context as speed_context
from services.console.views import fragment, page
from services.store import deployments
from services.store.models import Artifact, Run

router = APIRouter()


@router.get("/p/{slug}/deployment")
def deployment_page(request: Request, here: Viewer) -> Response:
    """What serves, the timeline, the roll-back button."""
    return page(request, here, "deployment.html", _state(request, here))


@router.get("/p/{slug}/deployment/live")
def deployment_live(request: Request, here: Viewer) -> Response:
    """The same again, for the page to swap in."""
    return fragment("deployment_live.html", {"project": here.project, **_state(request, here)})


def _state(request: Request, here: Here) -> dict[str, Any]:
    deployment = deployments.create(here.session, here.project.id)
    events = deployments.events(here.session, here.project.id)
    artifact = here.session.get(Artifact, deployment.active_digest) if deployment.active_digest else None
    run = here.session.get(Run, artifact.run_id) if artifact and artifact.run_id else None
    changed = [event for event in events if event.kind in ("flip", "roll_back")]
    return {
        "deployment": deployment,
        "events": events,
        "artifact": artifact,
        "run": run,
        "since": changed[0].at if changed else None,
        "may_draft": {name: here.may(name) for name in ("lead", "operator")},
        **speed_context(request, here),
        **rollout_context(here, deployment, events),
        **earned_context(request, here),
    }
