"""The admin API's part on webhooks: made, tried out, rotated, disabled, and what became of each event."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import Field

from services.admin import shapes
from services.admin.access import Trainer
from services.settings import Settings
from services.store import webhook_deliveries, webhook_rules, webhooks
from services.store.models import Webhook, WebhookDelivery

router = APIRouter(prefix="/api/p/{slug}/webhooks")
LISTED = 200


class NewWebhook(shapes.Body):
    """Where to, and what of; without events, all of them."""

    url: str = Field(max_length=4000)
    events: list[str] = Field(default_factory=lambda: list(webhooks.EVENTS), max_length=10)


class Rotation(shapes.Body):
    """`at_once`: the old secret signs nothing any more."""

    at_once: bool = False


class Disabling(shapes.Body):
    """Why; the page shows it."""

    reason: str = Field("", max_length=500)


@router.get("")
def list_webhooks(caller: Trainer, slug: str) -> dict[str, Any]:
    """Oldest first, without their secrets."""
    found = webhooks.list_(caller.session, caller.project(slug).id)
    return {"webhooks": [_webhook(row) for row in found], "events": dict(webhooks.EVENTS)}


@router.post("", status_code=201)
def create_webhook(request: Request, caller: Trainer, slug: str, sent: NewWebhook) -> dict[str, Any]:
    """A webhook; its secret is in this answer and nowhere else. 400 for an address that may not be one."""
    settings: Settings = request.app.state.settings
    made = webhooks.create(
        caller.session, caller.project(slug), url=sent.url, events=sent.events, actor=caller.actor,
        private=settings.webhook_private_targets,
    )  # fmt: skip
    return _with_secret(request, made)


@router.post("/{webhook_id}/rotate")
def rotate_webhook(request: Request, caller: Trainer, slug: str, webhook_id: UUID, sent: Rotation) -> dict[str, Any]:
    """Another secret, in this answer and nowhere else; 409 within a day of the last time."""
    project = caller.project(slug)
    made = webhooks.rotate(caller.session, project.id, webhook_id, caller.actor, at_once=sent.at_once)
    return _with_secret(request, made)


@router.post("/{webhook_id}/test", status_code=202)
def try_webhook(caller: Trainer, slug: str, webhook_id: UUID) -> dict[str, Any]:
    """Send an event that says nothing; 409 while the webhook is disabled."""
    return _delivery(webhooks.try_out(caller.session, caller.project(slug).id, webhook_id))


@router.post("/{webhook_id}/disable")
def disable_webhook(caller: Trainer, slug: str, webhook_id: UUID, sent: Disabling) -> dict[str, Any]:
    """Send nothing more; what is on its way is cancelled."""
    reason = sent.reason.strip().replace("\x00", "") or "disabled through the API"
    return _webhook(webhooks.disable(caller.session, caller.project(slug).id, webhook_id, caller.actor, reason))


@router.post("/{webhook_id}/enable")
def enable_webhook(caller: Trainer, slug: str, webhook_id: UUID) -> dict[str, Any]:
    """Send again from the next event on."""
    return _webhook(webhooks.enable(caller.session, caller.project(slug).id, webhook_id, caller.actor))


@router.delete("/{webhook_id}")
def delete_webhook(caller: Trainer, slug: str, webhook_id: UUID) -> dict[str, Any]:
    """Forget it and its deliveries."""
    webhooks.remove(caller.session, caller.project(slug).id, webhook_id, caller.actor)
    return {"id": str(webhook_id), "deleted": True}


@router.get("/{webhook_id}/deliveries")
def list_deliveries(caller: Trainer, slug: str, webhook_id: UUID) -> dict[str, Any]:
    """What became of each event, newest first."""
    webhook = webhooks.get(caller.session, caller.project(slug).id, webhook_id)
    found = webhook_deliveries.newest(caller.session, webhook.id, limit=LISTED)
    return {"deliveries": [_delivery(row) for row in found]}


@router.post("/{webhook_id}/deliveries/{delivery_id}/resend", status_code=202)
def resend_delivery(caller: Trainer, slug: str, webhook_id: UUID, delivery_id: UUID) -> dict[str, Any]:
    """The same event again, under the same id; 409 while it is on its way."""
    return _delivery(webhooks.resend(caller.session, caller.project(slug).id, webhook_id, delivery_id))


def _with_secret(request: Request, row: Webhook) -> dict[str, Any]:
    return {**_webhook(row), "secret": webhook_rules.secret(request.app.state.pepper, row.id, row.rotation)}


def _webhook(row: Webhook) -> dict[str, Any]:
    return {
        "id": str(row.id), "url": row.url, "events": row.events, "rotation": row.rotation,
        "rotated_at": shapes.moment(row.rotated_at), "given_up": row.given_up, "created_by": row.created_by,
        "created_at": shapes.moment(row.created_at), "disabled_at": shapes.moment(row.disabled_at),
        "disabled_reason": row.disabled_reason,
    }  # fmt: skip


def _delivery(row: WebhookDelivery) -> dict[str, Any]:
    return {
        "id": str(row.id), "event": row.event, "payload": row.payload, "state": row.state, "attempts": row.attempts,
        "status": row.status, "error": row.error, "took_ms": row.took_ms, "next_at": shapes.moment(row.next_at),
        "created_at": shapes.moment(row.created_at), "delivered_at": shapes.moment(row.delivered_at),
    }  # fmt: skip
