"""Training runs: the list, "Train now", and a run's page that moves while it works."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from services.console.access import Here, Lead, Viewer
from services.console.run_view import before_and_after, describe
from services.console.views import fragment, page, wants_page
from services.errors import NotFound
from services.store import audit, pages, runs
from services.store.models import Run

router = APIRouter()
Outcome = Annotated[str, Query(pattern="^(win|tie|loss)?$")]


@router.get("/p/{slug}/runs")
def run_list(request: Request, here: Viewer) -> Response:
    """Newest first, with what the gate said."""
    return page(request, here, "runs.html", _list(here))


@router.get("/p/{slug}/runs/live")
def run_list_live(here: Viewer) -> Response:
    """The list again, for the page to swap in."""
    return fragment("runs_live.html", {"project": here.project, **_list(here)})


def _list(here: Here) -> dict[str, Any]:
    lines = pages.run_lines(here.session, here.project.id)
    unfinished = next(
        (line.run for line in lines if line.run.state in runs.UNFINISHED and line.run.kind != "speculator"), None
    )
    scores = {line.run.id: before_and_after(line.summary) for line in lines}
    return {
        "lines": lines,
        "scores": scores,
        "unfinished": unfinished,
        "judged": pages.judgements(here.session, here.project.id),
    }


@router.post("/p/{slug}/runs")
def train_now(request: Request, here: Lead) -> Response:
    """Start a run with the project's own parameters; 409 while another is unfinished."""
    run = runs.start(here.session, here.project, params={}, created_by=here.user.email)
    audit.record(here.session, here.user.email, "run.start", f"run:{run.id}", {"project": here.project.slug})
    url = f"/p/{here.project.slug}/runs/{run.id}"
    if wants_page(request):
        return RedirectResponse(url, status_code=303)
    return JSONResponse({"id": str(run.id), "url": url}, status_code=201)


@router.get("/p/{slug}/runs/{run_id}")
def run_page(request: Request, here: Viewer, run_id: UUID, show: Outcome = "") -> Response:
    """One run, from its revision to the decision."""
    context = describe(here.session, _run(here, run_id), show)
    return page(request, here, "run.html", context)


@router.get("/p/{slug}/runs/{run_id}/live")
def run_live(here: Viewer, run_id: UUID, show: Outcome = "") -> Response:
    """The run's body again, for the page to swap in."""
    context = describe(here.session, _run(here, run_id), show)
    may = {"lead": here.may("lead")}
    return fragment("run_live.html", {"project": here.project, "may": may, **context})


@router.post("/p/{slug}/runs/{run_id}/cancel")
def cancel(here: Lead, run_id: UUID) -> Response:
    """Ask the run to stop; a finished one answers 409."""
    run = runs.request_cancel(here.session, _run(here, run_id).id)
    audit.record(here.session, here.user.email, "run.cancel", f"run:{run.id}")
    return RedirectResponse(f"/p/{here.project.slug}/runs/{run.id}", status_code=303)


def _run(here: Here, run_id: UUID) -> Run:
    run = here.session.get(Run, run_id)
    if run is None or run.project_id != here.project.id:
        raise NotFound("there is no such run in this project")
    return run
