"""The "webhook.deliver" job: sign one event, send it to the address that was checked, write down how it went.

A worker that dies between sending and writing sends the event again, under the same id: at least once, never lost.
"""

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import structlog

from services.errors import InvalidRequest
from services.settings import Settings
from services.store import failpoints, webhook_deliveries, webhook_rules
from services.store.jobs import Lease
from services.store.keys import load_pepper
from services.store.models import WebhookDelivery
from services.store.webhook_deliveries import Outcome
from worker.hooks import pinned

USER_AGENT = "whet-webhooks/1"

log = structlog.get_logger()


class Message(NamedTuple):
    """What is sent where."""

    url: str
    headers: dict[str, str]
    body: bytes


def deliver_job(lease: Lease, settings: Settings) -> None:
    """Handler of "webhook.deliver"."""
    delivery_id = UUID(lease.payload["delivery_id"])
    message = _message(lease, settings, delivery_id)
    if message is None:
        return
    outcome = _send(message, private=settings.webhook_private_targets)
    failpoints.reach("webhook.sent")
    with lease.transaction() as session:
        webhook_deliveries.record(session, delivery_id, lease.job_id, outcome)
        lease.succeed(session)
    log.info("webhook", delivery=str(delivery_id), status=outcome.status, error=outcome.error)


def _message(lease: Lease, settings: Settings, delivery_id: UUID) -> Message | None:
    """None when there is nothing to send any more. The event's body is the same in each attempt, its time is not."""
    with lease.transaction() as session:
        way = webhook_deliveries.take(session, delivery_id, lease.job_id)
        if way is None:
            return None
        webhook, delivery = way
        body = body_of(delivery, settings.console_url)
        signing = webhook_rules.secrets_of(
            load_pepper(settings), webhook.id, webhook.rotation, webhook.rotated_at, datetime.now(UTC)
        )
        signed = webhook_rules.headers(f"msg_{delivery.id.hex}", body, signing)
        return Message(webhook.url, {"content-type": "application/json", "user-agent": USER_AGENT, **signed}, body)


def body_of(delivery: WebhookDelivery, console_url: str) -> bytes:
    """`type`, `timestamp` and `data`, whose `url` leads to the page that shows it."""
    data: dict[str, Any] = dict(delivery.payload)
    path = data.pop("path", None)
    if path is not None:
        data["url"] = f"{console_url}{path}"
    told = {"type": delivery.event, "timestamp": delivery.created_at.astimezone(UTC).isoformat(), "data": data}
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


def _send(message: Message, *, private: bool) -> Outcome:
    try:
        place = webhook_rules.checked(message.url, private=private)
    except InvalidRequest as error:  # the setting that allowed it has been taken back
        return Outcome(None, error.message, 0.0)
    return pinned.post(place, message.headers, message.body, private=private)
