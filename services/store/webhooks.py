"""Webhooks: who is told of a project's events, and telling them.

`emit` belongs to the transaction of what happened: deliveries and their jobs are written with it or not at all, so no
event is lost and none is told that did not happen.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import webhook_deliveries, webhook_rules
from services.store.models import Evaluation, Project, Run, Webhook, WebhookDelivery

EVENTS: Mapping[str, str] = {
    "run.finished": "A run has ended, well or not",
    "gate.decided": "The gate has let a candidate pass or refused it, or somebody overrode a refusal",
    "deployment.rolled_back": "A project went back to earlier weights",
}
# Changes of a deployment that are told as rolled back. Heads change no answer and are not told.
ROLL_BACKS = ("roll_back", "canary_rolled_back", "canary_quarantined")
MOST = 10


# --- what an operator does --------------------------------------------------------------------------------


def create(
    session: Session, project: Project, *, url: str, events: Sequence[str], actor: str, private: bool = False
) -> Webhook:
    """A webhook of the project. Raises InvalidRequest, Conflict beyond MOST."""
    place = webhook_rules.checked(url.strip(), private=private)
    wanted = _checked_events(events)
    session.get_one(Project, project.id, with_for_update=webhook_deliveries.HELD)
    if len(list_(session, project.id)) >= MOST:
        raise Conflict(f"a project has at most {MOST} webhooks: delete one first")
    made = Webhook(project_id=project.id, url=place.url, events=wanted, created_by=actor)
    session.add(made)
    session.flush()
    webhook_deliveries.note(session, actor, "create", made, {"events": wanted})
    return made


def _checked_events(events: Sequence[str]) -> list[str]:
    unknown = sorted(set(events) - set(EVENTS))
    if unknown or not events:
        raise InvalidRequest(f"events are one or more of {', '.join(EVENTS)}", param="events")
    return [name for name in EVENTS if name in events]


def list_(session: Session, project_id: UUID) -> list[Webhook]:
    """Oldest first."""
    return list(session.scalars(select(Webhook).where(Webhook.project_id == project_id).order_by(Webhook.id)))


def get(session: Session, project_id: UUID, webhook_id: UUID) -> Webhook:
    """The project's own, held until the transaction ends. Raises NotFound."""
    found = session.get(Webhook, webhook_id, with_for_update=webhook_deliveries.HELD, populate_existing=True)
    if found is None or found.project_id != project_id:
        raise NotFound(f"this project has no webhook {webhook_id}")
    return found


def rotate(session: Session, project_id: UUID, webhook_id: UUID, actor: str, *, at_once: bool = False) -> Webhook:
    """A new secret; the old one signs beside it for a day, or `at_once` never again, for one that has leaked.

    Raises Conflict within that day, `at_once` aside: no more than two ever sign.
    """
    webhook = get(session, project_id, webhook_id)
    now = datetime.now(UTC)
    if not at_once and webhook.rotated_at is not None and now < webhook.rotated_at + webhook_rules.OVERLAP:
        ends = webhook.rotated_at + webhook_rules.OVERLAP
        raise Conflict(f"the secret was rotated less than a day ago; again from {ends:%Y-%m-%d %H:%M} UTC, or at once")
    webhook.rotation += 1
    webhook.rotated_at = None if at_once else now
    detail = {"rotation": webhook.rotation, "at_once": at_once}
    webhook_deliveries.note(session, actor, "rotate", webhook, detail)
    return webhook


def disable(session: Session, project_id: UUID, webhook_id: UUID, actor: str, reason: str) -> Webhook:
    """Send nothing more; what is on its way is cancelled."""
    webhook = get(session, project_id, webhook_id)
    if webhook.disabled_at is None:
        webhook_deliveries.shut(session, webhook, reason)
        webhook_deliveries.note(session, actor, "disable", webhook, {"reason": reason})
    return webhook


def enable(session: Session, project_id: UUID, webhook_id: UUID, actor: str) -> Webhook:
    """Send again from the next event on; what was missed can be sent again by hand."""
    webhook = get(session, project_id, webhook_id)
    if webhook.disabled_at is not None:
        webhook.disabled_at, webhook.disabled_reason, webhook.given_up = None, None, 0
        webhook_deliveries.note(session, actor, "enable", webhook, {})
    return webhook


def remove(session: Session, project_id: UUID, webhook_id: UUID, actor: str) -> None:
    """Forget it and its deliveries; jobs on their way find nothing to do."""
    webhook = get(session, project_id, webhook_id)
    session.delete(webhook)
    webhook_deliveries.note(session, actor, "delete", webhook, {})


def try_out(session: Session, project_id: UUID, webhook_id: UUID) -> WebhookDelivery:
    """Send an event that says nothing, once. Raises Conflict when it is disabled."""
    webhook = get(session, project_id, webhook_id)
    _refuse_disabled(webhook)
    payload = {"project": session.get_one(Project, project_id).slug, "said": "A test: nothing has happened."}
    return webhook_deliveries.send(session, webhook, webhook_deliveries.TEST, payload)


def resend(session: Session, project_id: UUID, webhook_id: UUID, delivery_id: UUID) -> WebhookDelivery:
    """The same event under the same id, with all its tries again. Raises NotFound, Conflict while it is on its way."""
    webhook = get(session, project_id, webhook_id)
    _refuse_disabled(webhook)
    return webhook_deliveries.resend(session, webhook, delivery_id)


def _refuse_disabled(webhook: Webhook) -> None:
    if webhook.disabled_at is not None:
        raise Conflict("this webhook is disabled: enable it first")


# --- what happens -----------------------------------------------------------------------------------------


def emit(session: Session, project_id: UUID, event: str, payload: dict[str, Any]) -> list[WebhookDelivery]:
    """Tell whoever wants to know, in the caller's transaction: ids and decisions, never a text of an interaction."""
    assert event in EVENTS, event
    wanted = select(Webhook).where(
        Webhook.project_id == project_id, Webhook.disabled_at.is_(None), Webhook.events.contains([event])
    )
    # One that is being deleted is passed over; otherwise writing to it would take what happened down with it.
    held = wanted.order_by(Webhook.id).with_for_update(read=True, key_share=True, skip_locked=True)
    found = session.scalars(held).all()
    if not found:
        return []
    slug = session.get_one(Project, project_id).slug
    return [webhook_deliveries.send(session, webhook, event, {"project": slug, **payload}) for webhook in found]


def run_finished(session: Session, run: Run) -> None:
    """A run's ending, without its error: that may quote a row."""
    said = {
        "succeeded": f"The {run.kind} run has ended: {run.phase}.",
        "failed": f"The {run.kind} run has failed ({run.phase}); its page says why.",
        "cancelled": f"The {run.kind} run was cancelled.",
    }[run.state]
    slug = session.get_one(Project, run.project_id).slug
    payload = {
        "run_id": str(run.id), "kind": run.kind, "state": run.state, "phase": run.phase,
        "artifact_digest": run.artifact_digest, "said": said, "path": f"/p/{slug}/runs/{run.id}",
    }  # fmt: skip
    emit(session, run.project_id, "run.finished", payload)


def gate_decided(session: Session, evaluation: Evaluation) -> None:
    """What the gate said, and why in its own words; or that somebody knows better."""
    slug = session.get_one(Project, evaluation.project_id).slug
    decision = "override" if evaluation.overridden_at is not None else evaluation.decision
    said = {
        "promote": "passed: better than what serves",
        "refuse": "was refused: what serves stays",
        "override": "was refused, and somebody has overridden that: its run goes on",
    }[decision]
    payload = {
        "evaluation_id": str(evaluation.id), "run_id": str(evaluation.run_id) if evaluation.run_id else None,
        "decision": decision, "candidate_digest": evaluation.candidate_digest,
        "baseline_digest": evaluation.baseline_digest, "said": f"The candidate {said}.",
        "reasons": list(evaluation.reasons),
        "path": f"/p/{slug}/evaluations/{evaluation.id}",
    }  # fmt: skip
    emit(session, evaluation.project_id, "gate.decided", payload)


def rolled_back(
    session: Session, project_id: UUID, *, kind: str, generation: int, old: str | None, to: str | None, reason: str
) -> None:
    """Earlier weights serve again, or a canary was withdrawn from."""
    slug = session.get_one(Project, project_id).slug
    payload = {
        "kind": kind, "generation": generation, "from_digest": old, "to_digest": to, "said": reason,
        "path": f"/p/{slug}/deployment",
    }  # fmt: skip
    emit(session, project_id, "deployment.rolled_back", payload)
