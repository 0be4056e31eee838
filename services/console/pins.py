"""What takes effect at once in a project: pinned answers and worked examples, each with its switch."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from services.console.access import Here, Lead, Viewer
from services.console.views import page
from services.store import audit, people, pins, projects, worked
from services.store.instant_config import read_pins, read_worked

router = APIRouter()
SHOWN = 100


@router.get("/p/{slug}/pins")
def pins_page(request: Request, here: Viewer) -> Response:
    """Pins, newest first: what is served, who approved it, how often it was, and the way to withdraw it."""
    config = here.project.config
    listed = pins.page(here.session, here.project.id, limit=SHOWN)
    context = {
        "listed": listed,
        "withdrawing": people.names_of(here.session, [one.pin.withdrawn_by for one in listed]),
        "used": pins.used(here.session, here.project.id),
        "shown": SHOWN,
        "pin_config": read_pins(config),
        "worked_config": read_worked(config),
        "worked": worked.counted(here.session, here.project.id),
    }
    return page(request, here, "pins.html", context)


@router.post("/p/{slug}/pins/{pin_id}/withdraw")
def withdraw(here: Lead, pin_id: UUID, reason: Annotated[str, Form(max_length=500)] = "") -> Response:
    """Serve this answer no more."""
    said = reason.strip().replace("\x00", "") or "withdrawn from the console"
    pins.withdraw(here.session, here.project.id, pin_id, here.user.email, said)
    return _back(here)


@router.post("/p/{slug}/pins/configure")
def configure(
    here: Lead,
    what: Annotated[Literal["pinned_answers", "worked_examples"], Form()],
    enabled: Annotated[bool, Form()],
) -> Response:
    """Switch one of the two on or off; what else is configured of it stays."""
    changes: dict[str, Any] = {what: {**(here.project.config.get(what) or {}), "enabled": enabled}}
    projects.configure(here.session, here.project, changes)
    if what == "worked_examples" and enabled:
        worked.ring(here.session, here.project.id)
    audit.record(
        here.session, here.user.email, "project.configure", f"project:{here.project.id}", {"config": changes}
    )  # fmt: skip
    return _back(here)


def _back(here: Here) -> Response:
    return RedirectResponse(f"/p/{here.project.slug}/pins", status_code=303)
