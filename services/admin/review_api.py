"""Reviewing with an API key of scope review: what the console's review page does, and the log to look things up in.

A judgement needs a person. The key acts as whoever it was made by, with the role they hold at that moment.
"""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import Field

from services.admin import shapes
from services.admin.access import Caller, Reviewer
from services.errors import Forbidden, InvalidRequest
from services.store import browse, feedback, interactions, people, reviews, search
from services.store.models import InteractionBody, Project, ReviewItem, UserAccount
from services.store.reviews_sides import meant, pair_of

router = APIRouter(prefix="/api/p/{slug}")
Text = Annotated[str, Query(max_length=200)]


class Lease(shapes.Body):
    """How many items to hold, those held already included."""

    count: int = Field(5, ge=1, le=20)


class Judgement(shapes.Body):
    """A judgement, under the lease that came with the item. `preference` names a side of a pair, or a tie."""

    verdict: str
    lease_token: UUID
    idempotency_key: str
    correction: str | None = None
    preference: Literal["left", "right", "tie"] | None = None
    tags: list[str] = Field(default_factory=list, max_length=50)
    spans: list[dict[str, Any]] = Field(default_factory=list, max_length=100)
    comment: str | None = None
    active_ms: int | None = None


class Held(shapes.Body):
    lease_token: UUID


class Undo(shapes.Body):
    annotation_id: UUID


def _reviewing(caller: Caller, slug: str) -> tuple[Project, UserAccount]:
    """The project, and the person the key acts as. Raises Forbidden when nobody may judge with this key now."""
    project = caller.project(slug)
    user = caller.session.get(UserAccount, caller.key.user_id) if caller.key.user_id else None
    if user is None:
        raise Forbidden("this key acts as nobody: a reviewer makes one with the scope review on the keys page")
    role = people.role_on(caller.session, user.id, project.id)
    if user.disabled_at is not None or people.rank(role) < people.rank("reviewer"):
        raise Forbidden("whoever this key acts as may not review here any more", code="insufficient_role")
    return project, user


@router.post("/review/lease")
def lease(caller: Reviewer, slug: str, sent: Lease) -> dict[str, Any]:
    """Items to judge, held for three minutes unless a heartbeat renews them."""
    project, user = _reviewing(caller, slug)
    held = reviews.lease(caller.session, project.id, user.id, sent.count)
    logged = interactions.get_many(caller.session, [item.interaction_id for item in held])
    items = []
    for item in held:
        record = logged.get(item.interaction_id)
        if record is None or record.body is None:
            reviews.withdraw(caller.session, item)  # its text is past retention: there is nothing to judge
        else:
            items.append(_item(item, record.body, user.id))
    return {"items": items, "tags": project.config.get("tags", [])}


def _item(item: ReviewItem, body: InteractionBody, user_id: UUID) -> dict[str, Any]:
    """Blind: neither what chose it, nor which weights answered, nor which answer of a pair was served."""
    pair = pair_of(item, body, user_id)
    return {
        "id": str(item.id), "lease_token": str(item.lease_token), "lease_expires_at": _iso(item.lease_expires_at),
        "messages": body.messages, "output": "" if pair else body.output, "pair": pair,
    }  # fmt: skip


@router.post("/review/items/{item_id}/annotations", status_code=201)
def annotate(caller: Reviewer, slug: str, item_id: UUID, sent: Judgement) -> dict[str, Any]:
    """Store a judgement once per idempotency key; 409 when the lease is lost."""
    project, user = _reviewing(caller, slug)
    values = sent.model_dump(exclude={"lease_token"})
    values["preference"] = meant(sent.preference, user.id, item_id)
    judgement = reviews.Judgement(**values)
    stored = reviews.submit(caller.session, project.id, item_id, user.id, sent.lease_token, judgement)
    annotation = stored.annotation
    return {
        "id": str(annotation.id), "item_id": str(item_id), "interaction_id": str(annotation.interaction_id),
        "verdict": annotation.verdict, "replayed": stored.replayed,
    }  # fmt: skip


@router.post("/review/items/{item_id}/heartbeat")
def heartbeat(caller: Reviewer, slug: str, item_id: UUID, sent: Held) -> dict[str, Any]:
    """Keep an item for three more minutes."""
    project, user = _reviewing(caller, slug)
    expires = reviews.heartbeat(caller.session, project.id, item_id, user.id, sent.lease_token)
    return {"lease_expires_at": _iso(expires)}


@router.post("/review/items/{item_id}/release")
def release(caller: Reviewer, slug: str, item_id: UUID, sent: Held) -> dict[str, Any]:
    """Give an item back unjudged."""
    project, user = _reviewing(caller, slug)
    reviews.release(caller.session, project.id, item_id, user.id, sent.lease_token)
    return {"released": True}


@router.post("/review/undo")
def undo(caller: Reviewer, slug: str, sent: Undo) -> dict[str, Any]:
    """Take a judgement back; repeating it changes nothing more."""
    project, user = _reviewing(caller, slug)
    item = reviews.undo(caller.session, project.id, user.id, sent.annotation_id)
    return {"item_id": str(item.id), "state": item.state}


@router.get("/interactions")
def list_interactions(
    caller: Reviewer, slug: str, q: Text = "", finish: Text = "", feedback: Text = "", window: Text = "all",
    user: Text = "", session: Text = "", tag: Text = "", before: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> dict[str, Any]:  # fmt: skip
    """Newest first, excerpts only; `before` is the last id of the page before."""
    project = _reading(caller, slug)
    asked = {"finish": finish, "feedback": feedback, "window": window}
    for name, value in asked.items():
        if value and value not in search.CHOICES[name]:  # a page leaves it out; a program must not get everything
            raise InvalidRequest(f"{name} is one of {', '.join(search.CHOICES[name])}, not {value!r}", param=name)
    wanted = search.parsed(asked | {"q": q, "user": user, "session": session, "tag": tag})
    found = search.newest(caller.session, project.id, wanted, before=before, limit=limit)
    lines = browse.lines(caller.session, project.id, found.ids)
    return {
        "interactions": [
            {
                "id": str(line.id), "started_at": _iso(line.started_at), "origin": line.origin,
                "adapter_digest": line.adapter_digest, "finish_reason": line.finish_reason,
                "prompt_tokens": line.prompt_tokens, "completion_tokens": line.completion_tokens,
                "latency_ms": line.latency_ms, "prompt": line.prompt, "output": line.output,
            }
            for line in lines
        ]
    }  # fmt: skip


@router.get("/interactions/{interaction_id}")
def show_interaction(caller: Reviewer, slug: str, interaction_id: UUID) -> dict[str, Any]:
    """One answer in full, with what was said about it."""
    logged = interactions.get(caller.session, _reading(caller, slug).id, interaction_id)
    row, body = logged.interaction, logged.body
    return {
        "id": str(row.id), "started_at": _iso(row.started_at), "adapter_digest": row.adapter_digest,
        "finish_reason": row.finish_reason, "messages": body.messages if body else None,
        "output": body.output if body else None,
        "feedback": [
            {"id": str(one.id), "rating": one.rating, "score": one.score, "comment": one.comment,
             "correction": one.correction, "user": one.author, "created_at": _iso(one.created_at)}
            for one in feedback.of_interaction(caller.session, interaction_id)
        ],
    }  # fmt: skip


def _reading(caller: Caller, slug: str) -> Project:
    """The project whose log is read. Whoever may not review here any more does not go on reading with their key."""
    return _reviewing(caller, slug)[0] if caller.key.user_id else caller.project(slug)


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
