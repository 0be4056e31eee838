"""The interactions list, its saved views, and one interaction's page."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qsl
from uuid import UUID

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import RedirectResponse

from services.console.access import Here, Viewer
from services.console.embedder import Embedder
from services.console.tokens import token_pieces
from services.console.views import page
from services.errors import InvalidRequest, Unavailable
from services.store import (
    browse,
    drafts,
    evaluations,
    feedback,
    interactions,
    pages,
    replay,
    saved_views,
    search,
    speed,
)
from services.store.models import ReviewItem, Run
from services.store.search import Found, Search, parsed

router = APIRouter()
PAGE = 50
LAST_PAGE = search.RANKED // PAGE
NO_VECTORS = "no answer of this project has a vector yet; the worker makes them while the engine has time"


class Results(NamedTuple):
    """What a search found. `ranked` lists are no longer than RANKED and paged by number, others by the last id.

    `note` says why meaning was left out; `known_since` is how far back it is known.
    """

    found: Found
    ranked: bool
    note: str = ""
    known_since: Any = None


def results(request: Request, here: Here, wanted: Search, *, before: UUID | None = None, limit: int) -> Results:
    """By words, meaning or both, as asked; by words alone while meaning is not to be had."""
    session, project_id = here.session, here.project.id
    if not wanted.words or wanted.mode == "words":
        return Results(search.newest(session, project_id, wanted, before=before, limit=limit), ranked=False)
    embedder: Embedder = request.app.state.embedder
    try:
        meaning = embedder.embed(wanted.words, project_id)
        since = search.embedded_since(session, project_id, meaning.model)
        if since is None:
            raise Unavailable(NO_VECTORS)
    except Unavailable as away:
        found = search.newest(session, project_id, wanted, before=before, limit=limit)
        return Results(found, ranked=False, note=away.message)
    near = search.nearest(session, project_id, wanted, meaning)
    if wanted.mode == "meaning":
        return Results(Found(near, None), ranked=True, known_since=since)
    held = search.best_words(session, project_id, wanted)
    both = search.fused(held.ids, near)[: search.RANKED]
    return Results(Found(both, held.back_to), ranked=True, known_since=since)


@router.get("/p/{slug}/interactions")
def interactions_list(
    request: Request,
    here: Viewer,
    before: UUID | None = None,
    number: Annotated[int, Query(alias="page", ge=1, le=LAST_PAGE)] = 1,
) -> Response:
    """Every filter is in the URL, so a view can be sent to a colleague."""
    wanted = parsed(request.query_params)
    got = results(request, here, wanted, before=before, limit=PAGE + 1)
    start = (number - 1) * PAGE if got.ranked else 0
    shown = got.found.ids[start : start + PAGE]
    more = len(got.found.ids) > start + PAGE
    context = {
        "lines": browse.lines(here.session, here.project.id, shown),
        "search": wanted,
        "query": wanted.query,
        "results": got,
        "pager": _pager(wanted.query, got, shown, number, more=more),
        "paged": before is not None or number > 1,
        "digests": browse.digests(here.session, here.project.id),
        "views": saved_views.visible(here.session, here.project.id, here.user.id),
    }
    return page(request, here, "interactions.html", context)


def _pager(query: str, got: Results, shown: Sequence[UUID], number: int, *, more: bool) -> dict[str, str | None]:
    """Ends of the addresses of the first and the next page."""
    head = f"{query}&" if query else ""
    if not more or (got.ranked and number >= LAST_PAGE):
        return {"first": query, "next": None}
    return {"first": query, "next": f"{head}page={number + 1}" if got.ranked else f"{head}before={shown[-1]}"}


@router.get("/p/{slug}/interactions/{interaction_id}")
def interaction(request: Request, here: Viewer, interaction_id: UUID) -> Response:
    """Everything that happened to one interaction. The search it was found by, if any, is the way back."""
    logged = interactions.get(here.session, here.project.id, interaction_id)
    item = browse.review_item(here.session, interaction_id)
    taught = pages.taught(here.session, interaction_id)
    replays = replay.replaying(here.session, here.project.id, interaction_id)
    context: dict[str, Any] = {
        "record": logged.interaction,
        "body": logged.body,
        "raw": _raw(here, logged) if logged.body else None,
        "tokens": token_pieces(request, logged.body) if logged.body else None,
        "opinions": feedback.of_interaction(here.session, interaction_id),
        "decoded": speed.of_answer(logged.interaction),
        "drafters": drafts.of_answer(logged.interaction),
        "item": item,
        "blind": still_blind(here, item),
        "judgements": browse.judgements(here.session, interaction_id),
        "taught": taught,
        "replays": replays,
        "adapters": _adapters(taught, replays),
        "evaluated": evaluations.of_interaction(here.session, interaction_id),
        "back": parsed(request.query_params).query,
    }
    return page(request, here, "interaction.html", context)


def _adapters(taught: Sequence[pages.TaughtBy], replays: Sequence[replay.Replayed]) -> dict[str, Run]:
    """The adapters that trained on it, with their runs."""
    runs = [lesson.run for lesson in taught if lesson.run is not None and lesson.split == "train"]
    runs += [one.run for one in replays]
    return {run.artifact_digest: run for run in runs if run.artifact_digest is not None and run.kind != "speculator"}


def _raw(here: Here, logged: interactions.Logged) -> str:
    """The request as an app could send it again."""
    assert logged.body is not None
    asked = {"model": here.project.slug} | logged.body.parameters
    if logged.interaction.endpoint == "/v1/completions" and len(logged.body.messages) == 1:
        asked |= {"prompt": logged.body.messages[0].get("content")}
    else:
        asked |= {"messages": logged.body.messages}
    return json.dumps(asked, ensure_ascii=False, indent=2)


def still_blind(here: Here, item: ReviewItem | None) -> bool:
    """Somebody who is about to judge an item must not be told what chose it or what others said."""
    return item is not None and item.state == "open" and item.lease_user_id == here.user.id


# --- saved views ------------------------------------------------------------------------------------------


@router.post("/p/{slug}/interactions/views")
def save_view(
    here: Viewer,
    name: Annotated[str, Form(max_length=200)],
    query: Annotated[str, Form(max_length=20_000)] = "",
    shared: Annotated[bool, Form()] = False,
) -> Response:
    """Keep the search that is shown; what is no search is not kept."""
    kept = Search() if not query else parsed(pairs(query))
    view = saved_views.save(here.session, here.project.id, here.user.id, name, kept.query, shared=shared)
    return _to_list(here, view.query)


@router.post("/p/{slug}/interactions/views/{view_id}/delete")
def delete_view(here: Viewer, view_id: UUID) -> Response:
    """One's own, or as a lead anybody's shared one."""
    view = saved_views.remove(here.session, here.project.id, here.user.id, view_id, lead=here.may("lead"))
    return _to_list(here, view.query)


def told(wanted: Search) -> str:
    """A search as the audit log keeps it. What was typed stays out: it may name whoever asks to be erased."""
    typed = ("q", "user", "session", "tag")
    return ", ".join(name if name in typed else f"{name} {value}" for name, value in wanted.stored)


def pairs(query: str) -> dict[str, str]:
    """The fields of an address's end; of one given twice the last."""
    try:
        return dict(parse_qsl(query, max_num_fields=100))
    except ValueError as error:
        raise InvalidRequest("this is no search") from error


def _to_list(here: Here, query: str) -> Response:
    where = f"/p/{here.project.slug}/interactions"
    return RedirectResponse(f"{where}?{query}" if query else where, status_code=303)
