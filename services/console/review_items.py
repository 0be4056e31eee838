"""A review item as a reviewer may see it: blind, the sides of a pair drawn for each reviewer and item.

What chose an item and which weights answered is told only after the judgement is stored, unless the project says
otherwise; which side of a pair was served is told by nothing that is sent.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from fastapi import Request
from sqlalchemy.orm import Session

from services.console.access import Here
from services.console.tokens import token_pieces
from services.store import interactions, reviews, reviews_history
from services.store.interactions import Logged
from services.store.models import Annotation, InteractionBody, ReviewItem
from services.store.reviews_sides import meant, pair_of


def blind(request: Request, here: Here, item: ReviewItem, logged: Logged, body: InteractionBody) -> dict[str, Any]:
    """Everything the page shows of an item before it is judged."""
    pair = pair_of(item, body, here.user.id)
    return {
        "id": str(item.id),
        "lease_token": str(item.lease_token),
        "lease_expires_at": iso(item.lease_expires_at),
        "messages": body.messages,
        "output": "" if pair else body.output,
        "pair": pair,
        "retrieved": body.retrieved,
        "tools": body.parameters.get("tools") or [],
        "schema": _schema(body),
        "tokens": None if pair else token_pieces(request, body),
        "told": None if here.project.config.get("blind_review", True) else told(item, logged),
        "history": [],
        "dispute": [],
        "again": False,
    }


def _schema(body: InteractionBody) -> object:
    """The JSON schema the app asked the answer to follow, if it did."""
    grammar = body.parameters.get("grammar")
    if not isinstance(grammar, dict) or grammar.get("kind") != "json_schema":
        return None
    try:
        return json.loads(grammar.get("text", ""))
    except (ValueError, RecursionError):
        return None


def told(item: ReviewItem, logged: Logged | None) -> dict[str, Any]:
    """What would anchor a judgement: why the item was chosen, and which weights answered."""
    return {
        "strategy": item.strategy,
        "adapter_digest": logged.interaction.adapter_digest if logged else None,
        "interaction_id": str(item.interaction_id),
    }


def after(annotation: Annotation, item: ReviewItem, logged: Logged | None) -> dict[str, Any]:
    """What is told once a judgement is stored."""
    said = {"state": item.state, "adjudicates": annotation.adjudicates, "again": annotation.again}
    return said | told(item, logged)


def for_lead(session: Session, here: Here, item: ReviewItem, queue: str) -> dict[str, Any]:
    """What a lead needs beside the item: why it was escalated, or what its judges said, unnamed."""
    if queue == "escalated":
        spoken = reviews.standing_annotations(session, item.id)
        asked = [{"comment": one.comment} for one in spoken if one.verdict == "escalate"]
        return {"history": asked, "again": _spoke(here, spoken)}
    if queue == "disputed":
        spoken = reviews_history.of_dispute(session, item.id)
        said = [_as_said(here, one) | {"mine": one.author_id == here.user.id} for one in spoken]
        return {"dispute": said, "again": _spoke(here, spoken)}
    return {}


def _spoke(here: Here, spoken: Sequence[Annotation]) -> bool:
    """Whether the lead who decides was one of them: then no other is left, and it is noted."""
    return any(one.author_id == here.user.id for one in spoken)


def _as_said(here: Here, one: Annotation) -> dict[str, Any]:
    return {
        "verdict": one.verdict,
        "correction": one.correction,
        "preference": meant(one.preference, here.user.id, one.review_item_id),
        "tags": one.tags,
        "spans": one.spans,
        "comment": one.comment,
    }


def looked_back(request: Request, here: Here, looked: Sequence[reviews_history.Looked]) -> list[dict[str, Any]]:
    """Judgements already made, for the page that was reloaded since; those whose text is gone are left out."""
    logged = interactions.get_many(here.session, [one.item.interaction_id for one in looked])
    entries = []
    for annotation, item in looked:
        record = logged.get(item.interaction_id)
        if record is None or record.body is None:
            continue
        shown = blind(request, here, item, record, record.body) | {"lease_token": None}
        entries.append(
            {
                "item": shown,
                "annotation_id": str(annotation.id),
                "judgement": _as_said(here, annotation),
                "reveal": after(annotation, item, record),
            }
        )
    return entries


def iso(moment: datetime | None) -> str | None:
    """A moment as JSON carries it."""
    return moment.isoformat() if moment else None
