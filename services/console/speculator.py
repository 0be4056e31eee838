"""The buttons beside a project's heads: train new ones, go back, and leave drafting to the suffix drafter."""

from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from services.console.access import Here, Lead, Operator
from services.console.views import wants_page
from services.errors import Conflict
from services.store import audit, deployments, runs, speculators
from services.store.models import Deployment

router = APIRouter()
Digest = Annotated[str, Form(max_length=64)]


class Wish(NamedTuple):
    """The heads on the page of the person who wishes for a change, and why they do."""

    live: str | None
    canary: str | None
    reason: str


def read_wish(live: Digest = "", canary: Digest = "", reason: Annotated[str, Form(max_length=500)] = "") -> Wish:
    """The fields of the three forms."""
    return Wish(live or None, canary or None, reason.strip().replace("\x00", ""))


Wished = Annotated[Wish, Depends(read_wish)]


@router.post("/p/{slug}/speculator/train")
def train(request: Request, here: Lead) -> Response:
    """Train heads on the log as it is; 409 while others are being trained."""
    run = runs.start(here.session, here.project, params={}, created_by=here.user.email, kind="speculator")
    audit.record(here.session, here.user.email, "run.start", f"run:{run.id}", {"project": here.project.slug})
    url = f"/p/{here.project.slug}/runs/{run.id}"
    if wants_page(request):
        return RedirectResponse(url, status_code=303)
    return JSONResponse({"id": str(run.id), "url": url}, status_code=201)


@router.post("/p/{slug}/speculator/rollback")
def roll_back(request: Request, here: Operator, wish: Wished) -> Response:
    """From the live heads to the last good ones; 409 when other heads draft since. Needs only Postgres, as the rest."""
    decision = _decision(here, wish, "rolled back from the console")
    return _changed(request, here, speculators.roll_back(here.session, here.project.id, decision))


@router.post("/p/{slug}/speculator/withdraw")
def withdraw(request: Request, here: Operator, wish: Wished) -> Response:
    """End the trial of a canary."""
    decision = _decision(here, wish, "withdrawn from the console")
    return _changed(request, here, speculators.withdraw_canary(here.session, here.project.id, decision))


@router.post("/p/{slug}/speculator/retire")
def retire(request: Request, here: Operator, wish: Wished) -> Response:
    """Draft by suffix alone until new heads pass."""
    decision = _decision(here, wish, "retired from the console")
    return _changed(request, here, speculators.retire(here.session, here.project.id, decision))


def _decision(here: Here, wish: Wish, reason: str) -> speculators.Decision:
    """A person's, and only for the heads on their page; the store compares again once it holds the row."""
    deployment = deployments.get(here.session, here.project.id)
    if (wish.live, wish.canary) != speculators.heads_of(deployment)[:2]:
        raise Conflict("other heads draft since this page was drawn: look again")
    return speculators.Decision(here.user.email, wish.reason or reason, {}, speculators.see(deployment))


def _changed(request: Request, here: Here, deployment: Deployment) -> Response:
    if wants_page(request):
        return RedirectResponse(f"/p/{here.project.slug}/deployment", status_code=303)
    state: dict[str, Any] = speculators.heads_of(deployment)._asdict()
    return JSONResponse(state)
