"""The projects somebody may see, and one project's loop at a glance."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.console.access import Anyone, Here, SignedIn, Viewer
from services.console.earned_view import context as earned_context
from services.console.memo import Memo
from services.console.quality_view import context as quality_context
from services.console.speed_view import context as speed_context
from services.console.speed_view import gain_of
from services.console.views import fragment, page
from services.store import browse, deployments, drift, pages, people, search

router = APIRouter()


@router.get("/")
def home(request: Request, here: SignedIn) -> Response:
    """Every project with its live numbers."""
    return page(request, here, "home.html", _home(request, here))


@router.get("/live")
def home_live(request: Request, here: SignedIn) -> Response:
    """The same numbers again, for the page to swap in."""
    return fragment("home_live.html", _home(request, here))


def _home(request: Request, here: Here) -> dict[str, Any]:
    projects = people.projects_of(here.session, here.user.id)
    return {
        "cards": pages.cards(here.session, projects),
        "traffic": {project.id: _traffic(request, here, project.id) for project in projects},
        "gains": {project.id: gain_of(request, here, project.id) for project in projects},
    }


def _traffic(request: Request, here: Here, project_id: UUID) -> pages.Traffic:
    memo: Memo[pages.Traffic] = request.app.state.traffic
    return memo.get(project_id, lambda: pages.traffic(here.session, project_id))


@router.get("/p/{slug}")
def overview(request: Request, here: Viewer) -> Response:
    """The loop strip, the queue, the latest traffic and changes."""
    return page(request, here, "overview.html", _overview(request, here))


@router.get("/p/{slug}/live")
def overview_live(request: Request, here: Viewer) -> Response:
    """The parts of the overview that move."""
    return fragment("overview_live.html", {"project": here.project, **_overview(request, here)})


def _overview(request: Request, here: Here) -> dict[str, Any]:
    project_id = here.project.id
    reviewed: Memo[tuple[int, list[pages.Strategy]]] = request.app.state.queues
    judgements, queue = reviewed.get(project_id, lambda: _reviewed(here))
    return {
        "loop": pages.loop(here.session, project_id, judgements),
        "traffic": _traffic(request, here, project_id),
        "queue": queue,
        "latest": _latest(here),
        "changes": deployments.events(here.session, project_id, limit=2),
        "run_lines": pages.run_lines(here.session, project_id, limit=3),
        **speed_context(request, here),
        **quality_context(request, here),
        **earned_context(request, here),
        "drift": _drift(request, here),
    }


def _reviewed(here: Here) -> tuple[int, list[pages.Strategy]]:
    return pages.judgements(here.session, here.project.id), pages.queue(here.session, here.project.id)


def _drift(request: Request, here: Here) -> drift.Drift | None:
    memo: Memo[drift.Drift | None] = request.app.state.drift
    return memo.get(here.project.id, lambda: drift.drifted(here.session, here.project.id))


def _latest(here: Here) -> list[browse.Line]:
    found = search.newest(here.session, here.project.id, search.Search(origin="live"), limit=6)
    return browse.lines(here.session, here.project.id, found.ids)


@router.get("/health")
def health(here: Anyone) -> JSONResponse:  # noqa: ARG001 - the guard is what the route declares
    """Whether this process answers. It says nothing about the database, whose absence a restart would not cure."""
    return JSONResponse({"ok": True})
