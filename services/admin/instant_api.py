"""The admin API's part on immediate effect: a project's pinned answers, and withdrawing one."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from services.admin import shapes
from services.admin.access import Trainer
from services.store import pins, worked
from services.store.instant_config import read_pins, read_worked
from services.store.models import Pin

router = APIRouter(prefix="/api/p/{slug}/pins")
LISTED = 1000


class Withdrawal(shapes.Body):
    """Why; kept with the pin."""

    reason: str = Field("", max_length=500)


@router.get("")
def list_pins(caller: Trainer, slug: str) -> dict[str, Any]:
    """Pins, newest first, with who approved them, and what the project allows."""
    project = caller.project(slug)
    return {
        "pinned_answers": read_pins(project.config).model_dump(),
        "worked_examples": read_worked(project.config).model_dump(),
        "embedded_examples": worked.counted(caller.session, project.id).examples,
        "pins": [_pin(one.pin, one.approvers) for one in pins.page(caller.session, project.id, limit=LISTED)],
    }


@router.post("/{pin_id}/withdraw")
def withdraw(caller: Trainer, slug: str, pin_id: UUID, sent: Withdrawal) -> dict[str, Any]:
    """Serve this answer no more; 409 when it was withdrawn before."""
    reason = sent.reason.strip().replace("\x00", "") or "withdrawn through the API"
    return _pin(pins.withdraw(caller.session, caller.project(slug).id, pin_id, caller.actor, reason), [])


def _pin(pin: Pin, approvers: list[str]) -> dict[str, Any]:
    return {
        "id": str(pin.id), "state": pin.state, "messages": pin.messages, "answer": pin.answer,
        "approvers": approvers, "hits": pin.hits, "last_hit_at": shapes.moment(pin.last_hit_at),
        "learned_digest": pin.learned_digest, "interaction_id": str(pin.interaction_id), "reason": pin.reason,
        "created_at": shapes.moment(pin.created_at), "withdrawn_at": shapes.moment(pin.withdrawn_at),
    }  # fmt: skip
