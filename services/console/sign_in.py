"""Signing in by a one-time link. Opening the link shows a button; only pressing it uses the link up, so that mail
scanners and link previews cannot."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from services.console import access
from services.console.access import Anyone
from services.console.views import page
from services.errors import Unauthenticated
from services.store import people

router = APIRouter()


@router.get("/sign-in")
def ask(request: Request, here: Anyone) -> Response:
    """Where somebody without a session lands."""
    if access.signed_in(request, here.session) is not None:
        return RedirectResponse("/", status_code=303)
    return page(request, here, "sign_in.html", {"token": None, "refused": None, "provider": _provider(request)})


@router.get("/sign-in/{token}")
def confirm(request: Request, here: Anyone, token: str) -> Response:
    """The button."""
    return page(request, here, "sign_in.html", {"token": token, "refused": None, "provider": None})


@router.post("/sign-in/{token}")
def redeem(request: Request, here: Anyone, token: str) -> Response:
    """Use the link up and start a session."""
    try:
        made = people.redeem(here.session, access.pepper(request), token, device=access.device(request))
    except Unauthenticated as error:
        context = {"token": None, "refused": error.message, "provider": _provider(request)}
        return page(request, here, "sign_in.html", context, status=error.status)
    access.end_current(request, here.session)
    response = RedirectResponse("/", status_code=303)
    access.set_cookie(request, response, made.cookie)
    return response


def _provider(request: Request) -> str | None:
    """What the button for the configured provider says."""
    provider = request.app.state.oidc
    return str(provider.name) if provider.configured else None


@router.post("/sign-out")
def sign_out(request: Request, here: Anyone) -> Response:
    """End the session here and in the database."""
    access.end_current(request, here.session)
    response = RedirectResponse("/sign-in", status_code=303)
    access.clear_cookie(request, response)
    return response
