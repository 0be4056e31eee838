"""Who is here: a project's people for its leads, everybody for administrators, and one person's page."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from services.console import access
from services.console.access import Administrator, Here, Lead
from services.console.views import page
from services.errors import Conflict, NotFound
from services.store import audit, audit_view, departure, invitations, keys, logins, people, projects, roles
from services.store.models import ApiKey, Project, UserAccount

router = APIRouter()
Email = Annotated[str, Form(max_length=260)]
Name = Annotated[str, Form(max_length=200)]
Role = Annotated[str, Form(max_length=20)]


# --- a project's people -----------------------------------------------------------------------------------


@router.get("/p/{slug}/people")
def project_people(request: Request, here: Lead) -> Response:
    """Who holds a role here, who reaches it as one of all projects, and who is invited."""
    return _project_page(request, here)


def _project_page(request: Request, here: Here, made: dict[str, Any] | None = None) -> Response:
    authority = here.authority
    context = {
        "base": f"/p/{here.project.slug}/people",
        "members": roles.members(here.session, here.project.id),
        "everywhere": roles.members(here.session, None),
        "invitations": invitations.list_(here.session, here.project.id),
        "grantable": authority.grantable(here.project.id),
        "authority": authority,
        "place": here.project.id,
        "made": made,
    }
    return page(request, here, "people.html", context)


@router.post("/p/{slug}/people/invite")
def invite_to_project(request: Request, here: Lead, email: Email, role: Role, name: Name = "") -> Response:
    """A one-time link for somebody new; somebody who has an account gets the role at once."""
    return _project_page(request, here, _invite(request, here, email, name, role, here.project.id))


@router.post("/p/{slug}/people/{user_id}/role")
def change_project_role(here: Lead, user_id: UUID, role: Role) -> Response:
    """Another role on this project."""
    roles.give(here.session, here.authority, user_id, role, here.project.id)
    return RedirectResponse(f"/p/{here.project.slug}/people", status_code=303)


@router.post("/p/{slug}/people/{user_id}/remove")
def remove_from_project(here: Lead, user_id: UUID) -> Response:
    """No role here any more; access ends with the next request."""
    roles.take(here.session, here.authority, user_id, here.project.id)
    return RedirectResponse(f"/p/{here.project.slug}/people", status_code=303)


@router.post("/p/{slug}/invitations/{invitation_id}/revoke")
def revoke_project_invitation(here: Lead, invitation_id: UUID) -> Response:
    """The link stops working."""
    _revoke(here, invitation_id, here.project.id)
    return RedirectResponse(f"/p/{here.project.slug}/people", status_code=303)


# --- everybody --------------------------------------------------------------------------------------------


@router.get("/people")
def everybody(request: Request, here: Administrator) -> Response:
    """Every account, and every invitation."""
    return _everybody_page(request, here)


def _everybody_page(request: Request, here: Here, made: dict[str, Any] | None = None) -> Response:
    context = {
        "base": "/people",
        "people": people.everybody(here.session),
        "invitations": invitations.list_(here.session, None, everywhere=True),
        "grantable": here.authority.grantable(None),
        "authority": here.authority,
        "place": None,
        "made": made,
    }
    return page(request, here, "everybody.html", context)


@router.post("/people/invite")
def invite(request: Request, here: Administrator, email: Email, role: Role, name: Name = "") -> Response:
    """As on a project, for every project."""
    return _everybody_page(request, here, _invite(request, here, email, name, role, None))


@router.post("/invitations/{invitation_id}/revoke")
def revoke_invitation(here: Administrator, invitation_id: UUID) -> Response:
    """The link stops working."""
    invitations.revoke(here.session, here.authority, invitation_id)
    return RedirectResponse("/people", status_code=303)


def _invite(request: Request, here: Here, email: str, name: str, role: str, project_id: UUID | None) -> dict[str, Any]:
    """What the page shows afterwards: a link, or that the role was given."""
    try:
        made = invitations.invite(
            here.session, here.authority, email=email, name=name, role=role, project_id=project_id
        )
    except Conflict as error:
        if error.code != "has_account":
            raise
        user = people.find_user(here.session, email)
        roles.give(here.session, here.authority, user.id, role, project_id)
        return {"email": user.email, "role": role, "url": None}
    return {"email": made.invitation.email, "role": role, "url": f"{access.own_url(request)}/invitation/{made.token}"}


def _revoke(here: Here, invitation_id: UUID, project_id: UUID) -> None:
    if invitation_id not in {one.invitation.id for one in invitations.list_(here.session, project_id)}:
        raise NotFound("there is no such invitation")
    invitations.revoke(here.session, here.authority, invitation_id)


# --- one person -------------------------------------------------------------------------------------------


@router.get("/people/{user_id}")
def person(request: Request, here: Administrator, user_id: UUID) -> Response:
    """Roles, sessions, what they did last, and the ways to let them in or shut them out."""
    return _person_page(request, here, user_id)


def _person_page(request: Request, here: Here, user_id: UUID, link: str | None = None) -> Response:
    shown = here.session.get(UserAccount, user_id)
    if shown is None:
        raise NotFound("there is no such person")
    held = roles.memberships(here.session, user_id)
    reached = {row.project_id for row in held}
    every = projects.list_all(here.session)
    context = {
        "shown": shown,
        "held": [(here.session.get(Project, row.project_id) if row.project_id else None, row.role) for row in held],
        "open_projects": [one for one in every if one.id not in reached],
        "everywhere_open": None not in reached,
        "logins": logins.of_user(here.session, user_id),
        "events": audit_view.lines(here.session, audit_view.Search(who=f"user:{user_id}"), limit=10),
        "grantable": here.authority.grantable(None),
        "former": departure.former_name(user_id),
        "link": link,
        "made_keys": _made_keys(here, user_id),
    }
    return page(request, here, "person.html", context)


def _made_keys(here: Here, user_id: UUID) -> list[tuple[ApiKey, Project | None]]:
    """Live keys of theirs that act as nobody: nothing else ends those."""
    made = keys.made_by(here.session, user_id)
    return [(key, here.session.get(Project, key.project_id) if key.project_id else None) for key in made]


@router.post("/people/{user_id}/keys/{key_id}/revoke")
def revoke_key(here: Administrator, user_id: UUID, key_id: UUID) -> Response:
    """End a key they made."""
    found = next((key for key in keys.made_by(here.session, user_id) if key.id == key_id), None)
    if found is None:
        raise NotFound("there is no such API key here")
    keys.revoke(here.session, found.id)
    audit.record(here.session, here.actor, "key.revoke", f"key:{found.prefix}")
    return _back(user_id)


@router.post("/people/{user_id}/role")
def change_role(here: Administrator, user_id: UUID, role: Role, project: Annotated[str, Form()] = "") -> Response:
    """A role on a project, or on all of them."""
    place = projects.get(here.session, project).id if project else None
    roles.give(here.session, here.authority, user_id, role, place)
    return _back(user_id)


@router.post("/people/{user_id}/remove")
def remove_role(here: Administrator, user_id: UUID, project: Annotated[str, Form()] = "") -> Response:
    """The role there ends at once."""
    place = projects.get(here.session, project).id if project else None
    roles.take(here.session, here.authority, user_id, place)
    return _back(user_id)


@router.post("/people/{user_id}/link")
def new_link(request: Request, here: Administrator, user_id: UUID) -> Response:
    """Another sign-in link, to be handed over; it is shown once."""
    shown = here.session.get(UserAccount, user_id)
    if shown is None or shown.deleted_at is not None:
        raise NotFound("there is no such person")
    if shown.disabled_at is not None:
        raise Conflict("this account is shut; open it first")
    token = people.make_sign_in_link(here.session, user_id)
    audit.record(here.session, here.actor, "user.link", f"user:{user_id}")
    return _person_page(request, here, user_id, f"{access.own_url(request)}/sign-in/{token}")


@router.post("/people/{user_id}/disable")
def disable(here: Administrator, user_id: UUID) -> Response:
    """Shut the account."""
    departure.disable(here.session, here.authority, user_id)
    return _back(user_id)


@router.post("/people/{user_id}/enable")
def enable(here: Administrator, user_id: UUID) -> Response:
    """Open it again."""
    departure.enable(here.session, here.authority, user_id)
    return _back(user_id)


@router.post("/people/{user_id}/delete")
def delete(here: Administrator, user_id: UUID) -> Response:
    """For good: judgements stay under a pseudonym."""
    departure.delete_user(here.session, here.authority, user_id)
    return RedirectResponse("/people", status_code=303)


@router.post("/people/{user_id}/sessions/{session_id}/end")
def end_session(here: Administrator, user_id: UUID, session_id: UUID) -> Response:
    """Sign somebody out of one browser."""
    login = logins.find(here.session, session_id)
    if login.user_id != user_id:
        raise NotFound("there is no such session; it may have ended already")
    logins.end(here.session, here.actor, login)
    return _back(user_id)


def _back(user_id: UUID) -> Response:
    return RedirectResponse(f"/people/{user_id}", status_code=303)
