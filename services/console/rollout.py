"""A person's word on a candidate on trial, on the freeze, and the one-key roll-back. All of it needs only Postgres."""

from typing import Annotated, NamedTuple

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from services.console.access import Here, Operator
from services.console.views import wants_page
from services.errors import InvalidRequest
from services.store import deployments, rollouts
from services.store.rollouts import Decision, What

router = APIRouter(prefix="/p/{slug}/deployment")


class Wish(NamedTuple):
    """The generation on the page of the person who wishes for a change, and why they do."""

    generation: int
    reason: str


def read_wish(generation: Annotated[int, Form()], reason: Annotated[str, Form(max_length=500)] = "") -> Wish:
    """The fields of every form: a deployment that has moved since answers 409."""
    return Wish(generation, reason.strip().replace("\x00", ""))


Wished = Annotated[Wish, Depends(read_wish)]


@router.post("/rollback")
def roll_back(request: Request, here: Operator, wish: Wished, what: Annotated[What, Form()] = "newest") -> Response:
    """Undo the newest change: end the canary, or go back to the last good weights."""
    rollouts.back(here.session, here.project.id, what, _decision(here, wish, "rolled back from the console"))
    return _changed(request, here)


@router.post("/promote")
def promote(request: Request, here: Operator, wish: Wished) -> Response:
    """Make the candidate live without waiting for its figures; a reason is asked for."""
    rollouts.promote(here.session, here.project.id, _decision(here, wish))
    return _changed(request, here)


@router.post("/canary/begin")
def begin_canary(request: Request, here: Operator, wish: Wished) -> Response:
    """From the shadow to a share of the users."""
    rollouts.begin_canary(here.session, here.project.id, _decision(here, wish, "begun from the console"))
    return _changed(request, here)


@router.post("/canary/stop")
def stop(request: Request, here: Operator, wish: Wished) -> Response:
    """Take the candidate off trial; it may be tried again."""
    rollouts.end(here.session, here.project.id, "stopped", _decision(here, wish, "stopped from the console"))
    return _changed(request, here)


@router.post("/canary/share")
def change_share(
    request: Request, here: Operator, wish: Wished, percent: Annotated[float, Form(ge=1, le=50)]
) -> Response:
    """Serve another share of the users; the comparison starts over."""
    decision = _decision(here, wish, "share changed from the console")
    rollouts.change_share(here.session, here.project.id, percent / 100, decision)
    return _changed(request, here)


@router.post("/start")
def start(request: Request, here: Operator, wish: Wished, digest: Annotated[str, Form(max_length=64)]) -> Response:
    """Have an artefact deployed that passed the gate before."""
    decision = _decision(here, wish, "deployed from the console")
    rollouts.order(here.session, here.project, digest, decision)
    return _changed(request, here)


@router.post("/looked")
def looked(request: Request, here: Operator, wish: Wished) -> Response:
    """A person has looked at the automatic roll-backs, and says what they saw."""
    decision = _decision(here, wish)
    deployments.unfreeze(
        here.session, here.project.id, actor=decision.actor, reason=decision.reason,
        expected_generation=wish.generation,
    )  # fmt: skip
    return _changed(request, here)


def _decision(here: Here, wish: Wish, reason: str | None = None) -> Decision:
    """Without a default somebody has to say why."""
    said = wish.reason or reason
    if said is None:
        raise InvalidRequest("say why: it is kept in the history", param="reason")
    return Decision(here.user.email, said, {}, wish.generation)


def _changed(request: Request, here: Here) -> Response:
    if wants_page(request):
        return RedirectResponse(f"/p/{here.project.slug}/deployment", status_code=303)
    deployment = deployments.get(here.session, here.project.id)
    return JSONResponse({"generation": deployment.generation, "active_digest": deployment.active_digest})
