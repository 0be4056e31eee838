"""Bulk actions: what one would do, doing it, how far it is, and the way back."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import RedirectResponse

from services.console.access import Here, Lead
from services.console.browsing import pairs, told
from services.console.views import fragment, page
from services.errors import InvalidRequest
from services.store import audit, browse, bulk
from services.store.bulk import Selection
from services.store.search import parsed

router = APIRouter()
# As many as a page of ranked results can show.
MOST_NAMED = 200
EVERYTHING = "all"


@router.get("/p/{slug}/interactions/bulk")
def preview(
    request: Request,
    here: Lead,
    kind: Annotated[str, Query(alias="do", max_length=20)] = "",
    tagged: Annotated[str, Query(max_length=210)] = "",
    scope: Annotated[str, Query(max_length=10)] = "named",
    ids: Annotated[list[UUID] | None, Query(alias="id", max_length=MOST_NAMED)] = None,
) -> Response:
    """What an action would do, counted, with samples; without an action, the last ones."""
    context: dict[str, Any] = {"actions": bulk.latest(here.session, here.project.id), "asked": None}
    if kind:
        context["asked"] = _asked(request, here, kind, tagged, scope, ids or [])
    return page(request, here, "bulk.html", context)


def _asked(request: Request, here: Here, kind: str, tagged: str, scope: str, ids: list[UUID]) -> dict[str, Any]:
    wanted = parsed(request.query_params)
    if scope == EVERYTHING:
        if wanted.words and wanted.mode != "words":
            raise InvalidRequest("meaning has no end: tick the answers to act on, or search by words alone")
        ids = []
    elif not ids:
        raise InvalidRequest("tick the answers to act on first, or choose all that fit")
    params = bulk.checked(kind, {"tag": tagged})
    seen = bulk.preview(here.session, here.project.id, kind, params, Selection.frozen(wanted, ids))
    return {
        "kind": kind, "params": params, "tagged": tagged, "scope": scope, "ids": ids, "search": wanted, "preview": seen,
        "samples": browse.lines(here.session, here.project.id, seen.samples), "query": wanted.query,
    }  # fmt: skip


@router.post("/p/{slug}/interactions/bulk")
def start(
    here: Lead,
    kind: Annotated[str, Form(alias="do", max_length=20)],
    expected: Annotated[int, Form(ge=0, le=bulk.MOST)],
    tagged: Annotated[str, Form(max_length=210)] = "",
    query: Annotated[str, Form(max_length=20_000)] = "",
    ids: Annotated[list[UUID] | None, Form(alias="id", max_length=MOST_NAMED)] = None,
) -> Response:
    """Queue it, and show how far it is."""
    params = bulk.checked(kind, {"tag": tagged})
    selection = Selection.frozen(parsed(pairs(query)), ids or [])
    action = bulk.start(here.session, here.project.id, here.user.id, kind, params, selection, expected)
    said = {"kind": kind, "expected": expected, "filters": told(selection.search), "named": len(ids or [])}
    audit.record(here.session, here.user.email, "interactions.bulk", f"bulk:{action.id}", said)
    return _to_action(here, action.id)


@router.get("/p/{slug}/interactions/bulk/{action_id}")
def action_page(request: Request, here: Lead, action_id: UUID) -> Response:
    """One action: its progress, what it changed, and the undo button."""
    return page(request, here, "bulk_action.html", _action(here, action_id))


@router.get("/p/{slug}/interactions/bulk/{action_id}/live")
def action_live(here: Lead, action_id: UUID) -> Response:
    """The part of its page that moves."""
    return fragment("bulk_live.html", {"project": here.project, **_action(here, action_id)})


@router.post("/p/{slug}/interactions/bulk/{action_id}/undo")
def undo(here: Lead, action_id: UUID) -> Response:
    """Queue the way back."""
    action = bulk.start_undo(here.session, here.project.id, action_id)
    audit.record(here.session, here.user.email, "interactions.bulk.undo", f"bulk:{action.id}", {"kind": action.kind})
    return _to_action(here, action.id)


def _action(here: Here, action_id: UUID) -> dict[str, Any]:
    action = bulk.get(here.session, here.project.id, action_id)
    selection = Selection.read(action.selection)
    return {"action": action, "query": selection.search.query, "named": len(selection.ids)}


def _to_action(here: Here, action_id: UUID) -> Response:
    return RedirectResponse(f"/p/{here.project.slug}/interactions/bulk/{action_id}", status_code=303)
