"""The two ways in besides a sign-in link: an invitation, and an OpenID Connect provider."""

from typing import Annotated, cast

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from services.console import access
from services.console.access import Anyone, Here
from services.console.oidc import ATTEMPT_SECONDS, Provider
from services.console.views import page
from services.errors import Forbidden, Unauthenticated, Unavailable
from services.settings import Settings
from services.store import identities, invitations, people
from services.store.base import Sessions

router = APIRouter()
Text = Annotated[str, Query(max_length=4000)]


# --- invitations ------------------------------------------------------------------------------------------


@router.get("/invitation/{token}")
def show_invitation(request: Request, here: Anyone, token: str) -> Response:
    """What the link offers. Looking does not use it up."""
    try:
        shown = invitations.find(here.session, token)
    except Unauthenticated as error:
        return _refused(request, here, error)
    current = access.signed_in(request, here.session)
    context = {"token": token, "shown": shown, "current": current.user if current else None, "refused": None}
    return page(request, here, "invitation.html", context)


@router.post("/invitation/{token}")
def accept_invitation(request: Request, here: Anyone, token: str) -> Response:
    """Make the account and start its session; who is signed in gets the role."""
    current = access.signed_in(request, here.session)
    try:
        accepted = invitations.accept(here.session, token, current.user.id if current else None)
    except (Unauthenticated, Forbidden) as error:
        return _refused(request, here, error)
    response = RedirectResponse("/", status_code=303)
    if accepted.created:
        access.end_current(request, here.session)
        pepper, device = access.pepper(request), access.device(request)
        made = people.start_session(here.session, pepper, accepted.user.id, method="invitation", device=device)
        access.set_cookie(request, response, made.cookie)
    return response


def _refused(request: Request, here: Here, error: Unauthenticated | Forbidden) -> HTMLResponse:
    context = {"token": None, "shown": None, "current": None, "refused": error.message}
    return page(request, here, "invitation.html", context, status=error.status)


# --- OpenID Connect ---------------------------------------------------------------------------------------


@router.get("/oidc/start")
def start(request: Request, here: Anyone) -> Response:
    """To the provider, with a fresh state, nonce and PKCE challenge."""
    try:
        begun = _provider(request).start(_callback(request))
    except Unavailable as error:
        return _ask_again(request, here, error)
    response = RedirectResponse(begun.url, status_code=303)
    response.set_cookie(
        attempt_cookie(request), begun.sealed, max_age=ATTEMPT_SECONDS, path="/", secure=access.over_https(request),
        httponly=True, samesite="lax",
    )  # fmt: skip
    return response


def attempt_cookie(request: Request) -> str:
    """Bound to this host as the session's is: no neighbouring host can plant an attempt of its own."""
    return "__Host-whet-oidc" if access.over_https(request) else "whet_oidc"


@router.get("/oidc/callback")
def callback(
    request: Request, here: Anyone, state: Text = "", code: Text = "", error: Text = "", iss: Text = ""
) -> Response:
    """Back from the provider: check everything, then start a session for an account that may exist."""
    sent = {"state": state, "code": code, "error": error, "iss": iss}
    answer = {name: value for name, value in sent.items() if value}
    try:
        vouched = _provider(request).finish(_callback(request), request.cookies.get(attempt_cookie(request)), answer)
        cookie = _admitted(request, vouched)
    except (Unauthenticated, Forbidden, Unavailable) as refusal:
        response: Response = _ask_again(request, here, refusal)
    else:
        response = RedirectResponse("/", status_code=303)
        access.set_cookie(request, response, cookie)
    response.delete_cookie(attempt_cookie(request), path="/", secure=access.over_https(request), httponly=True)
    return response


def _admitted(request: Request, vouched: identities.Vouched) -> str:
    """A session's cookie. In a transaction of its own: the provider's answer is slow, and a refusal leaves nothing."""
    settings = cast(Settings, request.app.state.settings)
    admission = identities.Admission(settings.oidc_domain_list, settings.oidc_role)
    with cast(Sessions, request.app.state.sessions).begin() as session:
        user = identities.admit(session, vouched, admission)
        access.end_current(request, session)
        made = people.start_session(
            session, access.pepper(request), user.id, method="oidc", device=access.device(request)
        )
    return made.cookie


def _ask_again(request: Request, here: Here, error: Unauthenticated | Forbidden | Unavailable) -> HTMLResponse:
    context = {"token": None, "refused": error.message, "provider": _provider(request).name}
    return page(request, here, "sign_in.html", context, status=error.status)


def _provider(request: Request) -> Provider:
    provider = cast(Provider, request.app.state.oidc)
    if not provider.configured:
        raise Unavailable("no sign-in provider is configured: WHET_OIDC_ISSUER names one")
    return provider


def _callback(request: Request) -> str:
    return f"{access.own_url(request)}/oidc/callback"
