"""A project's webhooks: made and rotated with the secret shown once, tried out, and what became of each event."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from services.console import access
from services.console.access import Here, Operator
from services.console.views import fragment, page
from services.settings import Settings
from services.store import webhook_deliveries, webhook_rules, webhooks
from services.store.models import Webhook

router = APIRouter()
STATES = {"pending": "live moving", "delivered": "ok", "given_up": "bad", "cancelled": ""}


@router.get("/p/{slug}/webhooks")
def webhooks_page(request: Request, here: Operator) -> Response:
    """Every webhook with its last delivery, and a form for another."""
    return _listed(request, here)


@router.post("/p/{slug}/webhooks")
def create(
    request: Request,
    here: Operator,
    url: Annotated[str, Form(max_length=4000)],
    event: Annotated[list[str], Form(max_length=10)],
) -> Response:
    """A webhook; its secret is on the answer and nowhere else."""
    settings: Settings = request.app.state.settings
    made = webhooks.create(
        here.session, here.project, url=url, events=event, actor=here.actor, private=settings.webhook_private_targets
    )
    return _listed(request, here, made)


@router.post("/p/{slug}/webhooks/{webhook_id}/rotate")
def rotate(request: Request, here: Operator, webhook_id: UUID, at_once: Annotated[bool, Form()] = False) -> Response:
    """Another secret; the old one signs beside it for a day, unless it has leaked."""
    made = webhooks.rotate(here.session, here.project.id, webhook_id, here.actor, at_once=at_once)
    return _listed(request, here, made)


@router.get("/p/{slug}/webhooks/{webhook_id}")
def webhook_page(request: Request, here: Operator, webhook_id: UUID) -> Response:
    """One webhook and what became of its events."""
    return page(request, here, "webhook.html", _one(here, webhook_id))


@router.get("/p/{slug}/webhooks/{webhook_id}/live")
def webhook_live(here: Operator, webhook_id: UUID) -> Response:
    """The deliveries again, for the page to swap in."""
    return fragment("webhook_live.html", {"project": here.project, **_one(here, webhook_id)})


@router.post("/p/{slug}/webhooks/{webhook_id}/test")
def try_out(here: Operator, webhook_id: UUID) -> Response:
    """Send an event that says nothing."""
    webhooks.try_out(here.session, here.project.id, webhook_id)
    return _to(here, webhook_id)


@router.post("/p/{slug}/webhooks/{webhook_id}/disable")
def disable(here: Operator, webhook_id: UUID, reason: Annotated[str, Form(max_length=500)] = "") -> Response:
    """Send nothing more; what is on its way is cancelled."""
    said = reason.strip().replace("\x00", "") or "disabled from the console"
    webhooks.disable(here.session, here.project.id, webhook_id, here.actor, said)
    return _to(here, webhook_id)


@router.post("/p/{slug}/webhooks/{webhook_id}/enable")
def enable(here: Operator, webhook_id: UUID) -> Response:
    """Send again from the next event on."""
    webhooks.enable(here.session, here.project.id, webhook_id, here.actor)
    return _to(here, webhook_id)


@router.post("/p/{slug}/webhooks/{webhook_id}/delete")
def delete(here: Operator, webhook_id: UUID) -> Response:
    """Forget it and its deliveries."""
    webhooks.remove(here.session, here.project.id, webhook_id, here.actor)
    return RedirectResponse(f"/p/{here.project.slug}/webhooks", status_code=303)


@router.post("/p/{slug}/webhooks/{webhook_id}/deliveries/{delivery_id}/resend")
def resend(here: Operator, webhook_id: UUID, delivery_id: UUID) -> Response:
    """The same event again, under the same id."""
    webhooks.resend(here.session, here.project.id, webhook_id, delivery_id)
    return _to(here, webhook_id)


def _listed(request: Request, here: Here, made: Webhook | None = None) -> Response:
    """With `made`, its secret: here and nowhere else."""
    found = webhooks.list_(here.session, here.project.id)
    secret = webhook_rules.secret(access.pepper(request), made.id, made.rotation) if made else None
    context = {
        "rows": [(one, webhook_deliveries.newest(here.session, one.id, limit=1)) for one in found],
        "events": webhooks.EVENTS, "most": webhooks.MOST, "made": made, "secret": secret,
    }  # fmt: skip
    return page(request, here, "webhooks.html", context | _words())


def _one(here: Here, webhook_id: UUID) -> dict[str, Any]:
    webhook = webhooks.get(here.session, here.project.id, webhook_id)
    found = webhook_deliveries.newest(here.session, webhook.id)
    # As jobs end in other processes, the page asks again for as long as something is on its way.
    waiting = any(one.state == "pending" for one in found)
    return {"webhook": webhook, "deliveries": found, "waiting": waiting, "events": webhooks.EVENTS} | _words()


def _words() -> dict[str, Any]:
    return {"states": STATES, "tries": webhook_deliveries.TRIES, "host_of": host_of}


def host_of(webhook: Webhook) -> str:
    """How pages name a webhook: the rest of its address may be as good as a password."""
    return webhook_rules.checked(webhook.url, private=True).host


def _to(here: Here, webhook_id: UUID) -> Response:
    return RedirectResponse(f"/p/{here.project.slug}/webhooks/{webhook_id}", status_code=303)
