"""The review page, and the endpoints that browsers and simulated reviewers share.

Items are blind: what chose them and which weights answered is told only after the judgement is stored.
"""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from services.console.access import Here, Reviewer
from services.console.tokens import token_pieces
from services.console.views import page
from services.errors import Forbidden
from services.store import interactions, pages, reviews
from services.store.models import Annotation, InteractionBody, ReviewItem

router = APIRouter()


class LeaseRequest(BaseModel):
    """How many items to hold, those held already included."""

    model_config = ConfigDict(extra="forbid")
    count: int = Field(5, ge=1, le=20)
    escalated: bool = False


NO_BODY = Body(default_factory=LeaseRequest)  # a request without a body asks for the usual five


class AnnotationRequest(BaseModel):
    """A judgement, under the lease that came with the item."""

    model_config = ConfigDict(extra="forbid")
    verdict: str
    lease_token: UUID
    idempotency_key: str
    correction: str | None = None
    tags: list[str] = Field(default_factory=list, max_length=50)
    spans: list[dict[str, Any]] = Field(default_factory=list, max_length=100)
    comment: str | None = None
    active_ms: int | None = None


class HeartbeatRequest(BaseModel):
    """Proof that the item is still in front of somebody."""

    model_config = ConfigDict(extra="forbid")
    lease_token: UUID


class UndoRequest(BaseModel):
    """The judgement to take back."""

    model_config = ConfigDict(extra="forbid")
    annotation_id: UUID


@router.get("/p/{slug}/review")
def review_page(request: Request, here: Reviewer, queue: str = "") -> Response:
    """The page; its items come by the lease endpoint. `queue=escalated` is for leads."""
    if queue == "escalated" and not here.may("lead"):
        raise Forbidden("escalated items are for leads", code="insufficient_role")
    context = {
        "escalated": queue == "escalated",
        "tags": here.project.config.get("tags", []),
        "guidelines": here.project.config.get("guidelines", ""),
        "worked": pages.worked_examples(here.session, here.project.id),
        "progress": reviews.progress(here.session, here.project.id, here.user.id),
    }
    return page(request, here, "review.html", context)


@router.post("/p/{slug}/review/lease")
def lease(request: Request, here: Reviewer, wanted: Annotated[LeaseRequest, NO_BODY]) -> JSONResponse:
    """Items to judge, held for three minutes unless a heartbeat renews them."""
    if wanted.escalated and not here.may("lead"):
        raise Forbidden("escalated items are for leads", code="insufficient_role")
    held = reviews.lease(here.session, here.project.id, here.user.id, wanted.count, escalated=wanted.escalated)
    logged = interactions.get_many(here.session, [item.interaction_id for item in held])
    items = []
    for item in held:
        record = logged.get(item.interaction_id)
        if record is None or record.body is None:
            reviews.withdraw(here.session, item)  # its text is past retention: there is nothing to judge
            continue
        items.append(_blind(request, item, record.body) | {"history": _history(here.session, item, wanted)})
    return JSONResponse({"items": items, "tags": here.project.config.get("tags", [])})


def _blind(request: Request, item: ReviewItem, body: InteractionBody) -> dict[str, Any]:
    return {
        "id": str(item.id),
        "lease_token": str(item.lease_token),
        "lease_expires_at": _iso(item.lease_expires_at),
        "messages": body.messages,
        "output": body.output,
        "retrieved": body.retrieved,
        "tools": body.parameters.get("tools") or [],
        "tokens": token_pieces(request, body),
    }


def _history(session: Session, item: ReviewItem, wanted: LeaseRequest) -> list[dict[str, Any]]:
    """Why it was escalated, for the lead who resolves it; first reviews stay blind to one another."""
    if not wanted.escalated:
        return []
    return [
        {"verdict": annotation.verdict, "comment": annotation.comment}
        for annotation in reviews.standing_annotations(session, item.id)
        if annotation.verdict == "escalate"
    ]


@router.post("/p/{slug}/review/items/{item_id}/annotations")
def annotate(here: Reviewer, item_id: UUID, sent: AnnotationRequest) -> JSONResponse:
    """Store a judgement: 201, or 200 when the same one was stored before, 409 when the lease is lost."""
    judgement = reviews.Judgement(**sent.model_dump(exclude={"lease_token"}))
    stored = reviews.submit(here.session, here.project.id, item_id, here.user.id, sent.lease_token, judgement)
    content = {"id": str(stored.annotation.id)} | _reveal(here, item_id, stored.annotation)
    return JSONResponse(content, status_code=200 if stored.replayed else 201)


def _reveal(here: Here, item_id: UUID, annotation: Annotation) -> dict[str, Any]:
    item = here.session.get_one(ReviewItem, item_id)
    record = interactions.get_many(here.session, [annotation.interaction_id]).get(annotation.interaction_id)
    return {
        "state": item.state,
        "interaction_id": str(annotation.interaction_id),
        "strategy": item.strategy,
        "adapter_digest": record.interaction.adapter_digest if record else None,
    }


@router.post("/p/{slug}/review/items/{item_id}/heartbeat")
def heartbeat(here: Reviewer, item_id: UUID, sent: HeartbeatRequest) -> JSONResponse:
    """Keep an item for three more minutes."""
    expires = reviews.heartbeat(here.session, here.project.id, item_id, here.user.id, sent.lease_token)
    return JSONResponse({"lease_expires_at": _iso(expires)})


@router.post("/p/{slug}/review/items/{item_id}/release")
def release(here: Reviewer, item_id: UUID, sent: HeartbeatRequest) -> JSONResponse:
    """Give an item back unjudged."""
    reviews.release(here.session, here.project.id, item_id, here.user.id, sent.lease_token)
    return JSONResponse({"released": True})


@router.post("/p/{slug}/review/undo")
def undo(here: Reviewer, sent: UndoRequest) -> JSONResponse:
    """Take one's own judgement back; the item is leased again to its author when it is free."""
    item = reviews.undo(here.session, here.project.id, here.user.id, sent.annotation_id)
    mine = item.lease_user_id == here.user.id
    return JSONResponse(
        {
            "item_id": str(item.id),
            "state": item.state,
            "lease_token": str(item.lease_token) if mine else None,
            "lease_expires_at": _iso(item.lease_expires_at) if mine else None,
        }
    )


@router.get("/p/{slug}/review/progress")
def progress(here: Reviewer) -> JSONResponse:
    """The bottom line of the page."""
    return JSONResponse(reviews.progress(here.session, here.project.id, here.user.id)._asdict())


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
