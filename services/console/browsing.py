"""The interactions list and one interaction's page."""

from typing import Annotated, Any
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from services.console.access import Here, Viewer
from services.console.tokens import token_pieces
from services.console.views import page
from services.store import browse, drafts, feedback, interactions, pages, speed
from services.store.models import ORIGINS, ReviewItem

router = APIRouter()
PAGE = 50
FINISHES = ("stop", "length", "cancelled", "error")
Text = Annotated[str, Query(max_length=200)]


@router.get("/p/{slug}/interactions")
def interactions_list(
    request: Request,
    here: Viewer,
    q: Text = "",
    digest: Text = "",
    finish: Text = "",
    feedback: Text = "",
    window: Text = "all",
    origin: Text = "",
    before: UUID | None = None,
) -> Response:
    """Newest first; every filter is in the URL, so a view can be sent to a colleague."""
    search = browse.Search(
        words=q.strip().replace("\x00", ""),
        digest=digest.replace("\x00", ""),
        finish=finish if finish in FINISHES else "",
        feedback=feedback if feedback in browse.FEEDBACK else "",
        window=window if window in browse.WINDOWS else "all",
        origin=origin if origin in ORIGINS else "",
    )
    lines = browse.lines(here.session, here.project.id, search, before=before, limit=PAGE + 1)
    chosen = {"q": q, "digest": digest, "finish": finish, "feedback": feedback, "window": window, "origin": origin}
    kept = {name: value for name, value in chosen.items() if value and (name, value) != ("window", "all")}
    older = urlencode(kept | {"before": str(lines[PAGE - 1].id)}) if len(lines) > PAGE else None
    context = {
        "lines": lines[:PAGE],
        "search": search,
        "filtered": bool(kept),
        "paged": before is not None,
        "older": older,
        "newest": urlencode(kept),
        "digests": browse.digests(here.session, here.project.id),
        "finishes": FINISHES,
        "origins": ORIGINS,
    }
    return page(request, here, "interactions.html", context)


@router.get("/p/{slug}/interactions/{interaction_id}")
def interaction(request: Request, here: Viewer, interaction_id: UUID) -> Response:
    """Everything that happened to one interaction."""
    logged = interactions.get(here.session, here.project.id, interaction_id)
    item = browse.review_item(here.session, interaction_id)
    context: dict[str, Any] = {
        "record": logged.interaction,
        "body": logged.body,
        "tokens": token_pieces(request, logged.body) if logged.body else None,
        "opinions": feedback.of_interaction(here.session, interaction_id),
        "decoded": speed.of_answer(logged.interaction),
        "drafters": drafts.of_answer(logged.interaction),
        "item": item,
        "blind": _still_blind(here, item),
        "judgements": browse.judgements(here.session, interaction_id),
        "taught": pages.taught(here.session, interaction_id),
    }
    return page(request, here, "interaction.html", context)


def _still_blind(here: Here, item: ReviewItem | None) -> bool:
    """Somebody who is about to judge an item must not be told what chose it or what others said."""
    return item is not None and item.state == "open" and item.lease_user_id == here.user.id
