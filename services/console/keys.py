"""API keys: made and rotated with the secret shown once, revoked, and when each was last used."""

from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from services.console import access
from services.console.access import Administrator, Here, Reviewer
from services.console.views import page
from services.errors import Forbidden, NotFound
from services.store import audit, keys, people
from services.store.models import ApiKey, Project, UserAccount

router = APIRouter()
OVERLAPS = {"0": "at once", "1": "in an hour", "24": "in a day", "168": "in a week"}
Name = Annotated[str, Form(max_length=200)]
Scopes = Annotated[list[str], Form(max_length=10)]
Hours = Annotated[int, Form(ge=0, le=720)]


# --- a project's keys -------------------------------------------------------------------------------------


@router.get("/p/{slug}/keys")
def project_keys(request: Request, here: Reviewer) -> Response:
    """All keys of the project for leads; for reviewers their own."""
    return _page(request, here, here.project)


@router.post("/p/{slug}/keys")
def create_project_key(request: Request, here: Reviewer, name: Name, scope: Scopes) -> Response:
    """A key with scopes one may give; the scope review acts as whoever makes the key."""
    return _page(request, here, here.project, _create(request, here, here.project, name, scope))


@router.post("/p/{slug}/keys/{key_id}/rotate")
def rotate_project_key(request: Request, here: Reviewer, key_id: UUID, overlap: Hours = 24) -> Response:
    """A successor; the old key lives on for the overlap."""
    return _page(request, here, here.project, _rotate(request, here, _key(here, here.project, key_id), overlap))


@router.post("/p/{slug}/keys/{key_id}/revoke")
def revoke_project_key(here: Reviewer, key_id: UUID) -> Response:
    """The key ends now; gateways know within two seconds."""
    _revoke(here, _key(here, here.project, key_id))
    return RedirectResponse(f"/p/{here.project.slug}/keys", status_code=303)


# --- keys of every project --------------------------------------------------------------------------------


@router.get("/keys")
def all_keys(request: Request, here: Administrator) -> Response:
    """Every key there is."""
    return _page(request, here, None)


@router.post("/keys")
def create_key(request: Request, here: Administrator, name: Name, scope: Scopes) -> Response:
    """A key that reaches every project."""
    return _page(request, here, None, _create(request, here, None, name, scope))


@router.post("/keys/{key_id}/rotate")
def rotate_key(request: Request, here: Administrator, key_id: UUID, overlap: Hours = 24) -> Response:
    """As on a project."""
    return _page(request, here, None, _rotate(request, here, _key(here, None, key_id), overlap))


@router.post("/keys/{key_id}/revoke")
def revoke_key(here: Administrator, key_id: UUID) -> Response:
    """As on a project."""
    _revoke(here, _key(here, None, key_id))
    return RedirectResponse("/keys", status_code=303)


# --- what both do -----------------------------------------------------------------------------------------


def _page(request: Request, here: Here, project: Project | None, made: dict[str, Any] | None = None) -> Response:
    found = keys.list_all(here.session, project.id if project else None)
    rows = sorted((key for key in found if _sees(here, key)), key=lambda key: not keys.live(key))
    successors = {key.rotated_from: key for key in rows if key.rotated_from}
    context = {
        "base": f"/p/{project.slug}/keys" if project else "/keys",
        "rows": [_row(here, key, successors.get(key.id)) for key in rows],
        "scopes": keys.scopes_for(here.role),
        "overlaps": OVERLAPS,
        "made": made,
    }
    return page(request, here, "keys.html", context)


def _row(here: Here, key: ApiKey, successor: ApiKey | None) -> dict[str, Any]:
    acts_as, maker = (here.session.get(UserAccount, one) if one else None for one in (key.user_id, key.created_by))
    live = keys.live(key)
    return {
        "key": key, "live": live, "successor": successor, "acts_as": acts_as.name if acts_as else None,
        "maker": maker.name if maker else None,
        "project": here.session.get(Project, key.project_id) if key.project_id else None,
        "may_rotate": live and successor is None and _may_rotate(here, key),
        "may_revoke": live and _holds(here, key),
    }  # fmt: skip


def _sees(here: Here, key: ApiKey) -> bool:
    return here.may("lead") or here.user.id in (key.created_by, key.user_id)


def _holds(here: Here, key: ApiKey) -> bool:
    """Whether somebody may do everything the key may."""
    return set(key.scopes) <= set(keys.scopes_for(here.role))


def _may_rotate(here: Here, key: ApiKey) -> bool:
    """A new secret for a key that judges as somebody is that somebody's alone."""
    return _holds(here, key) and key.user_id in (None, here.user.id)


def _key(here: Here, project: Project | None, key_id: UUID) -> ApiKey:
    found = here.session.get(ApiKey, key_id)
    if found is None or (project is not None and found.project_id != project.id) or not _sees(here, found):
        raise NotFound("there is no such API key here")
    return found


def _create(request: Request, here: Here, project: Project | None, name: str, scopes: list[str]) -> dict[str, Any]:
    beyond = sorted(set(scopes) & set(keys.SCOPE_ROLES) - set(keys.scopes_for(here.role)))
    if beyond:
        raise Forbidden(f"your role may not give a key the scope {', '.join(beyond)}", code="insufficient_role")
    key, plaintext = keys.create(
        here.session, pepper=access.pepper(request), name=name, scopes=scopes, created_by=here.user.id,
        project_id=project.id if project else None, user_id=here.user.id if "review" in scopes else None,
    )  # fmt: skip
    detail = {"scopes": key.scopes, "project": project.slug if project else None}
    audit.record(here.session, here.actor, "key.create", f"key:{key.prefix}", detail)
    return {"name": key.name, "plaintext": plaintext, "old": None}


def _rotate(request: Request, here: Here, key: ApiKey, overlap: int) -> dict[str, Any]:
    if not _may_rotate(here, key):
        raise Forbidden("this key may do more than you, or acts as somebody else", code="insufficient_role")
    made, plaintext = keys.rotate(
        here.session, key.id, pepper=access.pepper(request), overlap=timedelta(hours=overlap), created_by=here.user.id
    )
    detail = {"successor": made.prefix, "overlap_hours": overlap}
    audit.record(here.session, here.actor, "key.rotate", f"key:{key.prefix}", detail)
    return {"name": made.name, "plaintext": plaintext, "old": key}


def _revoke(here: Here, key: ApiKey) -> None:
    if not _holds(here, key) or people.rank(here.role) < people.rank("reviewer"):
        raise Forbidden("this key may do more than you; ask an administrator", code="insufficient_role")
    keys.revoke(here.session, key.id)
    audit.record(here.session, here.actor, "key.revoke", f"key:{key.prefix}")
