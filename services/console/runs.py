"""Training runs: the list, the form that starts one, and a run's page that moves while it works."""

import re
from collections.abc import Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from services.console import run_form
from services.console.access import Here, Lead, Viewer
from services.console.run_view import before_and_after, describe
from services.console.views import fragment, page, wants_page
from services.errors import NotFound
from services.store import audit, datasets, deployments, held_out, pages, projects, revisions, runs
from services.store.evaluation_config import BASE_ABILITY
from services.store.models import Run
from services.store.rollout_config import read_rollout
from services.store.run_params import KINDS, PARAMS, Kind, configured, errors_of
from services.store.train_when import read_config

router = APIRouter()
FIELD_MOST = 1000
STATES: Mapping[str, tuple[str, ...]] = {
    "working": runs.UNFINISHED, "succeeded": ("succeeded",), "failed": ("failed", "cancelled"),
}  # fmt: skip
Outcome = Annotated[str, Query(pattern="^(win|tie|loss)?$")]
KindFilter = Annotated[str, Query(pattern="^(sft|dpo|kto|speculator)?$")]
StateFilter = Annotated[str, Query(pattern="^(working|succeeded|failed)?$")]


@router.get("/p/{slug}/runs")
def run_list(request: Request, here: Viewer, kind: KindFilter = "", state: StateFilter = "") -> Response:
    """Newest first, with what the gate said; of one kind or state when asked."""
    return page(request, here, "runs.html", {**_list(here, kind, state), **_cautions(here)})


@router.get("/p/{slug}/runs/live")
def run_list_live(here: Viewer, kind: KindFilter = "", state: StateFilter = "") -> Response:
    """The list again, for the page to swap in."""
    return fragment("runs_live.html", {"project": here.project, **_list(here, kind, state)})


def _list(here: Here, kind: str, state: str) -> dict[str, Any]:
    lines = pages.run_lines(here.session, here.project.id, kind=kind or None, states=STATES.get(state))
    scores = {line.run.id: before_and_after(line.summary) for line in lines}
    return {
        # Counted only where somebody may be about to start their first run: the list is asked for every few seconds.
        "held_out": None if lines or kind or state else held_out.of_queue(here.session, here.project),
        "lines": lines,
        "scores": scores,
        "unfinished": runs.unfinished(here.session, here.project.id),
        "judged": pages.judgements(here.session, here.project.id),
        "kind": kind,
        "state": state,
        "kinds": run_form.kinds(),
        "when": read_config(here.project.config),
        "rollout": read_rollout(here.project.config),
    }


def _cautions(here: Here) -> dict[str, Any]:
    """What would keep any candidate from traffic, however good: known before a run, so told before it."""
    found = held_out.of_queue(here.session, here.project)
    return {
        "held_out": found,
        "too_few": held_out.warning(found) if found.short else None,
        "frozen": deployments.is_frozen(here.session, here.project.id),
    }


@router.get("/p/{slug}/runs/new")
def new_run(request: Request, here: Lead, kind: Annotated[Kind, Query()] = "sft") -> Response:
    """The form that starts a run of a kind."""
    return _form(request, here, kind, {})


async def _sent(request: Request) -> dict[str, str]:
    """The form's fields by name; its names are the parameters', which depend on the kind."""
    form = await request.form(max_files=0, max_fields=100)
    return {name: value[:FIELD_MOST] for name, value in form.items() if isinstance(value, str)}


@router.get("/p/{slug}/runs/triggers")
def show_triggers(request: Request, here: Lead) -> Response:
    """The form that says when runs begin by themselves."""
    return page(request, here, "run_triggers.html", {"fields": run_form.triggers(here.project)})


@router.post("/p/{slug}/runs/triggers")
def set_triggers(request: Request, here: Lead, sent: Annotated[dict[str, str], Depends(_sent)]) -> Response:
    """Say when runs begin by themselves; what is left empty triggers nothing."""
    fields = run_form.triggers(here.project, sent)
    if wants_page(request) and any(field.error for field in fields):
        return page(request, here, "run_triggers.html", {"fields": fields}, status=422)
    changes = run_form.filled(sent)
    projects.set_triggers(here.session, here.project, changes)
    detail = {"config": {"train_when": changes}}
    audit.record(here.session, here.user.email, "project.configure", f"project:{here.project.id}", detail)
    return RedirectResponse(f"/p/{here.project.slug}/runs", status_code=303)


def _form(
    request: Request, here: Here, kind: str, sent: Mapping[str, str], general: str | None = None, *, status: int = 200
) -> Response:
    found = [one for one in datasets.list_(here.session, here.project.id) if one.name != BASE_ABILITY]
    name = sent.get("dataset") or runs.DEFAULT_DATASET
    chosen = next((dataset for dataset in found if dataset.name == name), None)
    newest = revisions.latest(here.session, chosen.id) if chosen is not None else None
    context = {
        "form": run_form.make(here.project, kind, sent, newest, general),
        "kinds": run_form.kinds(),
        "datasets": [dataset.name for dataset in found] or [runs.DEFAULT_DATASET],
        "dataset": name,
        "unfinished": runs.unfinished(here.session, here.project.id, speculator=kind == "speculator"),
        **({} if kind == "speculator" else _cautions(here)),
    }
    return page(request, here, "run_new.html", context, status=status)


@router.post("/p/{slug}/runs")
def start(request: Request, here: Lead, sent: Annotated[dict[str, str], Depends(_sent)]) -> Response:
    """Start a run, with the project's own parameters where the form says nothing; 409 while another is unfinished."""
    kind = sent.get("kind", "sft")
    if kind in KINDS and "kind" in sent and (wrong := _form_again(request, here, kind, sent)) is not None:
        return wrong
    run = runs.start(
        here.session, here.project, params=run_form.parse(kind, sent) if kind in KINDS else {},
        created_by=here.user.email, kind=kind, dataset=sent.get("dataset") or runs.DEFAULT_DATASET,
    )  # fmt: skip
    audit.record(here.session, here.user.email, "run.start", f"run:{run.id}", {"project": here.project.slug})
    return _to_run(request, here, run)


def _form_again(request: Request, here: Here, kind: str, sent: Mapping[str, str]) -> Response | None:
    """The form with what is wrong beside the fields; None when nothing is, or when a script asks."""
    if not wants_page(request):
        return None
    params = {**configured(kind, here.project.config), **run_form.parse(kind, sent)}
    named = sent.get("dataset") or runs.DEFAULT_DATASET
    if re.fullmatch(datasets.NAME, named) is None:
        return _form(request, here, kind, {**sent, "dataset": ""}, "There is no such data set.", status=422)
    return _form(request, here, kind, sent, status=422) if errors_of(PARAMS[kind], params) else None


def _to_run(request: Request, here: Here, run: Run) -> Response:
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


@router.post("/p/{slug}/runs/{run_id}/retry")
def retry(request: Request, here: Lead, run_id: UUID) -> Response:
    """The same again, or on from what was trained; 409 unless it failed or was cancelled, while another is unfinished,
    and after three times."""
    run = runs.retry(here.session, _run(here, run_id), here.user.email)
    audit.record(here.session, here.user.email, "run.retry", f"run:{run.id}", {"retry_of": str(run_id)})
    return _to_run(request, here, run)


def _run(here: Here, run_id: UUID) -> Run:
    run = here.session.get(Run, run_id)
    if run is None or run.project_id != here.project.id:
        raise NotFound("there is no such run in this project")
    return run
