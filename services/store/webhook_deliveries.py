"""Each event's way to each webhook: its attempts, the pauses between them, and the end of it.

Attempts are jobs of their own, each with its `not_before`. Locks are taken in one order: job, webhook, delivery.
"""

import random
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import audit, jobs, webhook_rules
from services.store.models import Job, Webhook, WebhookDelivery

JOB = "webhook.deliver"
TEST = "webhook.test"
# Pauses before the second to the eighth attempt, in seconds: about a day in all.
PAUSES = (30, 120, 600, 3600, 10_800, 25_200, 46_800)
TRIES = len(PAUSES) + 1
SPREAD = 0.2
# Given up in a row before nothing is sent any more.
GIVEN_UP_MOST = 5
KEPT = timedelta(days=30)
# FOR NO KEY UPDATE: an event may be written beside it.
HELD: Any = {"key_share": True}


class Outcome(NamedTuple):
    """How one attempt went. `status` None: no answer came; `error` None: it was taken."""

    status: int | None
    error: str | None
    took_ms: float


class Way(NamedTuple):
    """A delivery and where it goes."""

    webhook: Webhook
    delivery: WebhookDelivery


def send(session: Session, webhook: Webhook, event: str, payload: dict[str, Any]) -> WebhookDelivery:
    """Put an event on its way; it leaves when the caller has committed."""
    delivery = WebhookDelivery(webhook_id=webhook.id, event=event, payload=payload)
    session.add(delivery)
    session.flush()
    _enqueue(session, webhook, delivery)
    return delivery


def resend(session: Session, webhook: Webhook, delivery_id: UUID) -> WebhookDelivery:
    """The same event under the same id, with all its tries again. Raises NotFound, Conflict while it is on its way."""
    delivery = session.get(WebhookDelivery, delivery_id, with_for_update=True, populate_existing=True)
    if delivery is None or delivery.webhook_id != webhook.id:
        raise NotFound(f"this webhook has no delivery {delivery_id}")
    if delivery.state == "pending" and delivery.attempts == 0:
        raise Conflict("it is on its way already")
    if delivery.job_id is not None:
        _drop_waiting(session, delivery.job_id)
    delivery.state, delivery.attempts, delivery.delivered_at = "pending", 0, None
    _enqueue(session, webhook, delivery)
    return delivery


def _drop_waiting(session: Session, job_id: UUID) -> None:
    """End a try that waits for its time. One that a worker has in hand finds that the delivery is another job's now."""
    waiting = select(Job.id).where(Job.id == job_id, Job.state == "queued").with_for_update(skip_locked=True)
    if session.scalar(waiting) is not None:
        jobs.request_cancel(session, job_id)


def newest(session: Session, webhook_id: UUID, *, limit: int = 50) -> list[WebhookDelivery]:
    """Newest first."""
    query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    return list(
        session.scalars(query.order_by(WebhookDelivery.created_at.desc(), WebhookDelivery.id.desc()).limit(limit))
    )


def shut(session: Session, webhook: Webhook, reason: str) -> None:
    """Disable a webhook; what is on its way to it is cancelled."""
    webhook.disabled_at, webhook.disabled_reason = datetime.now(UTC), reason
    waiting = select(WebhookDelivery).where(
        WebhookDelivery.webhook_id == webhook.id, WebhookDelivery.state == "pending"
    )
    for delivery in session.scalars(waiting.with_for_update()):
        delivery.state, delivery.next_at = "cancelled", None
    session.flush()


def note(session: Session, actor: str, what: str, webhook: Webhook, detail: dict[str, Any]) -> None:
    """A line in the audit log. It names the host alone: a path may be as good as a password."""
    session.flush()
    host = webhook_rules.checked(webhook.url, private=True).host
    audit.record(session, actor, f"webhook.{what}", f"webhook:{webhook.id}", {"host": host, **detail})


def _enqueue(session: Session, webhook: Webhook, delivery: WebhookDelivery, *, pause: float = 0.0) -> None:
    """The job of the next attempt. Its own retries are for workers that die; another answer is another job."""
    due = datetime.now(UTC) + timedelta(seconds=pause) if pause else None
    payload = {"delivery_id": str(delivery.id)}
    job = jobs.enqueue(session, JOB, payload, project_id=webhook.project_id, not_before=due)
    delivery.job_id, delivery.next_at = job.id, due or datetime.now(UTC)
    session.flush()


# --- what the worker does ---------------------------------------------------------------------------------


def take(session: Session, delivery_id: UUID, job_id: UUID) -> Way | None:
    """What is to be sent; None when it is no longer, or when another job carries it by now."""
    delivery = session.get(WebhookDelivery, delivery_id, populate_existing=True)
    if delivery is None or delivery.state != "pending" or delivery.job_id != job_id:
        return None
    webhook = session.get(Webhook, delivery.webhook_id, populate_existing=True)
    return Way(webhook, delivery) if webhook is not None and webhook.disabled_at is None else None


def record(session: Session, delivery_id: UUID, job_id: UUID | None, outcome: Outcome) -> None:
    """How an attempt went, and the next one when there is one. Ignored when another job carries the delivery by now."""
    way = _hold(session, delivery_id)
    if way is None or way.delivery.state != "pending" or way.delivery.job_id != job_id:
        return
    webhook, delivery = way
    if webhook.disabled_at is not None:  # it was put on its way while somebody disabled the webhook
        delivery.state, delivery.next_at = "cancelled", None
        session.flush()
        return
    delivery.attempts += 1
    delivery.status, delivery.error, delivery.took_ms = outcome
    delivery.next_at = None
    if outcome.error is None:
        delivery.state, delivery.delivered_at, webhook.given_up = "delivered", datetime.now(UTC), 0
    elif outcome.status == 410:
        delivery.state = "given_up"
        _shut_unasked(session, webhook, "the receiver says that it is gone for good (410)")
    elif delivery.attempts < TRIES and delivery.event != TEST:
        _enqueue(session, webhook, delivery, pause=pause_after(delivery.attempts))
    else:
        _give_up(session, webhook, delivery)
    session.flush()


def _hold(session: Session, delivery_id: UUID) -> Way | None:
    found = session.get(WebhookDelivery, delivery_id)
    webhook = session.get(Webhook, found.webhook_id, with_for_update=HELD, populate_existing=True) if found else None
    delivery = session.get(WebhookDelivery, delivery_id, with_for_update=True, populate_existing=True)
    return Way(webhook, delivery) if webhook is not None and delivery is not None else None


def pause_after(attempts: int) -> float:
    """Seconds until the next attempt: growing, and spread so that a receiver that comes back can breathe."""
    return PAUSES[attempts - 1] * random.uniform(1 - SPREAD, 1 + SPREAD)


def _give_up(session: Session, webhook: Webhook, delivery: WebhookDelivery) -> None:
    """A test that fails says so at once and counts for nothing."""
    delivery.state = "given_up"
    if delivery.event == TEST:
        return
    webhook.given_up += 1
    if webhook.given_up >= GIVEN_UP_MOST:
        _shut_unasked(session, webhook, f"{webhook.given_up} events in a row could not be delivered")


def _shut_unasked(session: Session, webhook: Webhook, reason: str) -> None:
    shut(session, webhook, reason)
    note(session, "worker", "disable", webhook, {"reason": reason})


# --- housekeeping -----------------------------------------------------------------------------------------


def settle(session: Session) -> int:
    """Deliveries whose job ended without them (its worker died three times) count it as an attempt; how many did."""
    carried = select(Job.id).where(Job.id == WebhookDelivery.job_id, Job.state.in_(jobs.UNFINISHED)).exists()
    query = select(WebhookDelivery.id, WebhookDelivery.job_id).where(WebhookDelivery.state == "pending", ~carried)
    stranded = session.execute(query.limit(100)).all()
    for delivery_id, job_id in stranded:
        record(session, delivery_id, job_id, Outcome(None, "the worker that had it in hand died", 0.0))
    return len(stranded)


def prune(session: Session) -> int:
    """Forget what was settled long ago; returns how many."""
    old = delete(WebhookDelivery).where(
        WebhookDelivery.state != "pending", WebhookDelivery.created_at < func.now() - KEPT
    )
    return len(session.scalars(old.returning(WebhookDelivery.id)).all())
