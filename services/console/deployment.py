"""What a project serves now, how it came to, and the way back."""

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from services.console.access import Here, Operator, Viewer
from services.console.earned_view import context as earned_context
from services.console.speed_view import context as speed_context
from services.console.views import fragment, page, wants_page
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
        **earned_context(request, here),
        "may_roll_back": here.may("operator") and deployment.active_digest is not None,
    }


@router.post("/p/{slug}/deployment/rollback")
def roll_back(
    request: Request,
    here: Operator,
    generation: Annotated[int, Form()],
    reason: Annotated[str, Form(max_length=500)] = "",
) -> Response:
    """Go back to the last good weights. Needs only Postgres, so it works while the engine is down.

    `generation` is the one the person was looking at: a deployment that has moved since answers 409.
    """
    deployment = deployments.roll_back(
        here.session,
        here.project.id,
        actor=here.user.email,
        reason=reason.strip().replace("\x00", "") or "rolled back from the console",
        expected_generation=generation,
    )
    if wants_page(request):
        return RedirectResponse(f"/p/{here.project.slug}/deployment", status_code=303)
    return JSONResponse({"generation": deployment.generation, "active_digest": deployment.active_digest})
