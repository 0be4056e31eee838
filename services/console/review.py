"""The review page, and the endpoints that browsers and simulated reviewers share."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from services.console.access import Here, Lead, Reviewer
from services.console.review_items import after, blind, for_lead, iso, looked_back
from services.console.views import page
from services.errors import Forbidden
from services.store import audit, gold, interactions, pages, review_keys, reviews, reviews_history
from services.store.models import Annotation, ReviewItem
from services.store.reviews_sides import meant

router = APIRouter()

Queue = Literal["open", "escalated", "disputed"]


class LeaseRequest(BaseModel):
    """How many items to hold, those held already included."""

    model_config = ConfigDict(extra="forbid")
    count: int = Field(5, ge=1, le=20)
    queue: Queue = "open"


NO_BODY = Body(default_factory=LeaseRequest)  # a request without a body asks for the usual five


class AnnotationRequest(BaseModel):
    """A judgement, under the lease that came with the item. `preference` names a side of a pair, or a tie."""

    model_config = ConfigDict(extra="forbid")
    verdict: str
    lease_token: UUID
    idempotency_key: str
    correction: str | None = None
    preference: Literal["left", "right", "tie"] | None = None
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


class KeysRequest(BaseModel):
    """Actions and the keys that shall stand for them; those left out return to the usual ones."""

    model_config = ConfigDict(extra="forbid")
    keys: dict[str, str] = Field(max_length=40)


@router.get("/p/{slug}/review")
def review_page(request: Request, here: Reviewer, queue: Queue = "open") -> Response:
    """The page; its items come by the lease endpoint. All queues but the open one are for leads."""
    _lead_only(here, queue)
    context = {
        "queue": queue,
        "keys": review_keys.of_person(here.session, here.user.id),
        "usual_keys": review_keys.USUAL,
        "tags": here.project.config.get("tags", []),
        "guidelines": here.project.config.get("guidelines", ""),
        "decided": reviews_history.decided(here.session, here.project.id),
        "worked": pages.worked_examples(here.session, here.project.id),
        "progress": reviews.progress(here.session, here.project.id, here.user.id),
    }
    return page(request, here, "review.html", context)


def _lead_only(here: Here, queue: Queue) -> None:
    if queue != "open" and not here.may("lead"):
        raise Forbidden(f"{queue} items are for leads", code="insufficient_role")


@router.post("/p/{slug}/review/lease")
def lease(request: Request, here: Reviewer, wanted: Annotated[LeaseRequest, NO_BODY]) -> JSONResponse:
    """Items to judge, held for three minutes unless a heartbeat renews them."""
    _lead_only(here, wanted.queue)
    held = reviews.lease(here.session, here.project.id, here.user.id, wanted.count, queue=wanted.queue)
    logged = interactions.get_many(here.session, [item.interaction_id for item in held])
    items = []
    for item in held:
        record = logged.get(item.interaction_id)
        if record is None or record.body is None:
            reviews.withdraw(here.session, item)  # its text is past retention: there is nothing to judge
            continue
        beside = for_lead(here.session, here, item, wanted.queue)
        items.append(blind(request, here, item, record, record.body) | beside)
    return JSONResponse({"items": items, "tags": here.project.config.get("tags", [])})


@router.post("/p/{slug}/review/items/{item_id}/annotations")
def annotate(here: Reviewer, item_id: UUID, sent: AnnotationRequest) -> JSONResponse:
    """Store a judgement: 201, or 200 when the same one was stored before, 409 when the lease is lost."""
    values = sent.model_dump(exclude={"lease_token"})
    values["preference"] = meant(sent.preference, here.user.id, item_id)
    judgement = reviews.Judgement(**values)
    stored = reviews.submit(here.session, here.project.id, item_id, here.user.id, sent.lease_token, judgement)
    content = {"id": str(stored.annotation.id)} | _reveal(here, item_id, stored.annotation)
    return JSONResponse(content, status_code=200 if stored.replayed else 201)


def _reveal(here: Here, item_id: UUID, annotation: Annotation) -> dict[str, Any]:
    item = here.session.get_one(ReviewItem, item_id)
    record = interactions.get_many(here.session, [annotation.interaction_id]).get(annotation.interaction_id)
    return after(annotation, item, record)


@router.post("/p/{slug}/review/items/{item_id}/heartbeat")
def heartbeat(here: Reviewer, item_id: UUID, sent: HeartbeatRequest) -> JSONResponse:
    """Keep an item for three more minutes."""
    expires = reviews.heartbeat(here.session, here.project.id, item_id, here.user.id, sent.lease_token)
    return JSONResponse({"lease_expires_at": iso(expires)})


@router.post("/p/{slug}/review/items/{item_id}/release")
def release(here: Reviewer, item_id: UUID, sent: HeartbeatRequest) -> JSONResponse:
    """Give an item back unjudged."""
    reviews.release(here.session, here.project.id, item_id, here.user.id, sent.lease_token)
    return JSONResponse({"released": True})


@router.post("/p/{slug}/review/items/{item_id}/gold")
def mark_gold(here: Lead, item_id: UUID) -> JSONResponse:
    """Make a settled item a hidden check of reviewers who have not seen it."""
    gold.mark(here.session, reviews.lock_item(here.session, here.project.id, item_id), here.user.id)
    audit.record(here.session, here.user.email, "review.gold", f"project:{here.project.id}", {"item": str(item_id)})
    return JSONResponse({"gold": True})


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
            "lease_expires_at": iso(item.lease_expires_at) if mine else None,
        }
    )


@router.get("/p/{slug}/review/progress")
def progress(here: Reviewer) -> JSONResponse:
    """The bottom line of the page."""
    return JSONResponse(reviews.progress(here.session, here.project.id, here.user.id)._asdict())


@router.get("/p/{slug}/review/history")
def history(request: Request, here: Reviewer) -> JSONResponse:
    """One's own last judgements, oldest first, so that looking back and undoing survive a reload."""
    looked = reviews_history.of_person(here.session, here.project.id, here.user.id)
    return JSONResponse({"judged": looked_back(request, here, looked)})


@router.put("/p/{slug}/review/keys")
def choose_keys(here: Reviewer, sent: KeysRequest) -> JSONResponse:
    """Keep somebody's own keys, for every project they review in."""
    return JSONResponse({"keys": review_keys.choose(here.session, here.user.id, sent.keys)})
