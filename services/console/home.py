"""The projects somebody may see, and one project's loop at a glance."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from services.console.access import Anyone, Here, SignedIn, Viewer
from services.console.views import fragment, page
from services.store import browse, deployments, pages, people

router = APIRouter()


@router.get("/")
def home(request: Request, here: SignedIn) -> Response:
    """Every project with its live numbers."""
    return page(request, here, "home.html", {"cards": _cards(here)})


@router.get("/live")
def home_live(here: SignedIn) -> Response:
    """The same numbers again, for the page to swap in."""
    return fragment("home_live.html", {"cards": _cards(here)})


def _cards(here: Here) -> list[pages.Card]:
    return pages.cards(here.session, people.projects_of(here.session, here.user.id))


@router.get("/p/{slug}")
def overview(request: Request, here: Viewer) -> Response:
    """The loop strip, the queue, the latest traffic and changes."""
    return page(request, here, "overview.html", _overview(here))


@router.get("/p/{slug}/live")
def overview_live(here: Viewer) -> Response:
    """The parts of the overview that move."""
    return fragment("overview_live.html", {"project": here.project, **_overview(here)})


def _overview(here: Here) -> dict[str, Any]:
    project_id = here.project.id
    return {
        "loop": pages.loop(here.session, project_id),
        "queue": pages.queue(here.session, project_id),
        "latest": browse.lines(here.session, project_id, browse.Search(origin="live"), limit=6),
        "changes": deployments.events(here.session, project_id, limit=4),
        "run_lines": pages.run_lines(here.session, project_id, limit=3),
    }


@router.get("/health")
def health(here: Anyone) -> JSONResponse:  # noqa: ARG001 - the guard is what the route declares
    """Whether this process answers. It says nothing about the database, whose absence a restart would not cure."""
    return JSONResponse({"ok": True})
