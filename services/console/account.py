"""One's own account: name, roles, and the browsers that are signed in."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from services.console.access import SignedIn
from services.console.views import page
from services.errors import NotFound
from services.store import audit, logins, people, roles
from services.store.models import Project

router = APIRouter()


@router.get("/account")
def account(request: Request, here: SignedIn) -> Response:
    """Who you are here, what you may do, and where you are signed in."""
    held = roles.memberships(here.session, here.user.id)
    context = {
        "held": [(here.session.get(Project, row.project_id) if row.project_id else None, row.role) for row in held],
        "logins": logins.of_user(here.session, here.user.id),
        "this": here.login.id,
    }
    return page(request, here, "account.html", context)


@router.post("/account/name")
def rename(here: SignedIn, name: Annotated[str, Form(max_length=200)]) -> Response:
    """What others read beside your judgements."""
    _, here.user.name = people.checked(here.user.email, name)
    here.session.flush()
    audit.record(here.session, here.actor, "user.rename", here.actor)
    return RedirectResponse("/account", status_code=303)


@router.post("/account/sessions/{session_id}/end")
def end(here: SignedIn, session_id: UUID) -> Response:
    """End one of your own sessions."""
    login = logins.find(here.session, session_id)
    if login.user_id != here.user.id:
        raise NotFound("there is no such session; it may have ended already")
    logins.end(here.session, here.actor, login)
    return RedirectResponse("/account", status_code=303)


@router.post("/account/sessions/end-others")
def end_others(here: SignedIn) -> Response:
    """End every session of yours but this one."""
    logins.end_all(here.session, here.actor, here.user.id, but=here.login.id)
    return RedirectResponse("/account", status_code=303)
