"""The admin API's part on people: accounts, roles, invitations, sessions, key rotation, the audit log."""

import json
from collections.abc import Generator
from datetime import timedelta
from typing import Annotated, Any, cast
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import Field

from services.admin import shapes
from services.admin.access import Admin, Caller
from services.app import Streamed
from services.errors import NotFound
from services.settings import Settings
from services.store import audit, audit_view, departure, invitations, keys, logins, people, roles
from services.store.base import Sessions
from services.store.models import ApiKey, UserAccount

router = APIRouter(prefix="/api")


class NewInvitation(shapes.Body):
    """`project` None invites to every project."""

    email: str
    role: str = "reviewer"
    name: str = ""
    project: str | None = None
    days: int = Field(7, ge=1, le=30)


class RoleChange(shapes.Body):
    """`project` None means the role on every project; `role` None takes the role there away."""

    role: str | None
    project: str | None = None


class Rotation(shapes.Body):
    """How long the old key lives on."""

    overlap_hours: int = Field(24, ge=0, le=720)


# --- accounts and roles -----------------------------------------------------------------------------------


@router.get("/users")
def list_users(caller: Admin) -> dict[str, Any]:
    """Accounts with their roles; a key of one project sees those who hold a role there."""
    place = caller.key.project_id
    entries = people.everybody(caller.session)
    shown = [_user(caller, entry.user) for entry in entries]
    return {"users": [one for one in shown if place is None or one["roles"]]}


@router.get("/users/{user_id}")
def show_user(caller: Admin, user_id: UUID) -> dict[str, Any]:
    """One account with its roles and the sessions that work."""
    user = _seen(caller, user_id)
    sessions = [] if caller.key.project_id else [_login(row) for row in logins.of_user(caller.session, user.id)]
    return {**_user(caller, user), "sessions": sessions}


@router.put("/users/{user_id}/roles")
def change_role(caller: Admin, user_id: UUID, sent: RoleChange) -> dict[str, Any]:
    """Give, change or take a role; 403 above what the key reaches, 409 for the last administrator."""
    place = _place(caller, sent.project)
    if sent.role is None:
        roles.take(caller.session, caller.authority, user_id, place)
    else:
        roles.give(caller.session, caller.authority, user_id, sent.role, place)
    return _user(caller, caller.session.get_one(UserAccount, user_id))


@router.post("/users/{user_id}/disable")
def disable(caller: Admin, user_id: UUID) -> dict[str, Any]:
    """Shut an account."""
    departure.disable(caller.session, caller.authority, user_id)
    return _user(caller, caller.session.get_one(UserAccount, user_id))


@router.post("/users/{user_id}/enable")
def enable(caller: Admin, user_id: UUID) -> dict[str, Any]:
    """Open it again."""
    departure.enable(caller.session, caller.authority, user_id)
    return _user(caller, caller.session.get_one(UserAccount, user_id))


@router.delete("/users/{user_id}")
def delete(caller: Admin, user_id: UUID) -> dict[str, Any]:
    """Delete a person for good; their judgements stay under the name in the answer."""
    return {"id": str(user_id), "name": departure.delete_user(caller.session, caller.authority, user_id)}


@router.delete("/sessions/{session_id}")
def end_session(caller: Admin, session_id: UUID) -> dict[str, Any]:
    """Sign somebody out of one browser; takes a key of all projects."""
    caller.everywhere()
    login = logins.find(caller.session, session_id)
    logins.end(caller.session, caller.actor, login)
    return {"id": str(session_id), "ended": True}


def _place(caller: Caller, slug: str | None) -> UUID | None:
    if slug is None:
        caller.everywhere()
        return None
    return caller.project(slug).id


def _seen(caller: Caller, user_id: UUID) -> UserAccount:
    user = caller.session.get(UserAccount, user_id)
    if user is None or (caller.key.project_id and not _roles(caller, user_id)):
        raise NotFound("there is no such person")
    return user


def _user(caller: Caller, user: UserAccount) -> dict[str, Any]:
    return {
        "id": str(user.id), "email": user.email, "name": user.name, "roles": _roles(caller, user.id),
        "created_at": shapes.moment(user.created_at), "disabled_at": shapes.moment(user.disabled_at),
        "deleted_at": shapes.moment(user.deleted_at),
    }  # fmt: skip


def _roles(caller: Caller, user_id: UUID) -> list[dict[str, Any]]:
    """As far as the key reaches: a key of one project learns of no other."""
    held = roles.memberships(caller.session, user_id)
    return [
        {"project": roles.slug_of(caller.session, row.project_id), "role": row.role}
        for row in held
        if caller.key.project_id in (None, row.project_id)
    ]


def _login(row: Any) -> dict[str, Any]:  # noqa: ANN401 - a mapped row
    return {
        "id": str(row.id), "device": row.device, "method": row.method, "created_at": shapes.moment(row.created_at),
        "last_seen_at": shapes.moment(row.last_seen_at),
    }  # fmt: skip


# --- invitations ------------------------------------------------------------------------------------------


@router.get("/invitations")
def list_invitations(caller: Admin) -> dict[str, Any]:
    """Open ones first, those of the last month after them."""
    place = caller.key.project_id
    found = invitations.list_(caller.session, place, everywhere=place is None)
    return {"invitations": [_invitation(one.invitation, one.project.slug if one.project else None) for one in found]}


@router.post("/invitations", status_code=201)
def invite(request: Request, caller: Admin, sent: NewInvitation) -> dict[str, Any]:
    """A one-time link with a role; 409 when the address has an account, which can be given a role instead."""
    made = invitations.invite(
        caller.session, caller.authority, email=sent.email, name=sent.name, role=sent.role,
        project_id=_place(caller, sent.project), lifetime=timedelta(days=sent.days),
    )  # fmt: skip
    settings: Settings = request.app.state.settings
    base = settings.public_console_url.rstrip("/") or str(request.base_url).rstrip("/")
    return {**_invitation(made.invitation, sent.project), "url": f"{base}/invitation/{made.token}"}


@router.delete("/invitations/{invitation_id}")
def revoke_invitation(caller: Admin, invitation_id: UUID) -> dict[str, Any]:
    """The link stops working; 409 when it was used or is over."""
    revoked = invitations.revoke(caller.session, caller.authority, invitation_id)
    return _invitation(revoked, roles.slug_of(caller.session, revoked.project_id))


def _invitation(row: Any, project: str | None) -> dict[str, Any]:  # noqa: ANN401 - a mapped row
    return {
        "id": str(row.id), "email": row.email, "role": row.role, "project": project,
        "state": invitations.state_of(row), "expires_at": shapes.moment(row.expires_at),
    }  # fmt: skip


# --- keys -------------------------------------------------------------------------------------------------


@router.post("/keys/{key_id}/rotate", status_code=201)
def rotate_key(request: Request, caller: Admin, key_id: UUID, sent: Rotation) -> dict[str, Any]:
    """A successor with the same scopes, shown once; the old key lives on for the overlap. 409 when it has one."""
    found = caller.session.get(ApiKey, key_id)
    if found is None or caller.key.project_id not in (None, found.project_id):
        raise NotFound(f"there is no API key {key_id}")
    if found.user_id is not None:
        caller.oversees(found.user_id)
    made, plaintext = keys.rotate(
        caller.session, key_id, pepper=request.app.state.pepper, overlap=timedelta(hours=sent.overlap_hours)
    )
    detail = {"successor": made.prefix, "overlap_hours": sent.overlap_hours}
    audit.record(caller.session, caller.actor, "key.rotate", f"key:{found.prefix}", detail)
    return {**shapes.key(made), "key": plaintext, "old_expires_at": shapes.moment(found.expires_at)}


# --- the audit log ----------------------------------------------------------------------------------------

Text = Annotated[str, Query(max_length=200)]


@router.get("/audit")
def audit_log(
    caller: Admin, project: Text = "", who: Text = "", action: Text = "", about: Text = "",
    before: Annotated[int | None, Query(ge=0, lt=2**63)] = None, limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> dict[str, Any]:  # fmt: skip
    """Newest first; without `project` it takes a key of all projects."""
    if not project:
        caller.everywhere()
    place = caller.project(project) if project else None
    search = audit_view.Search.asked(who=who, action=action, about=about, project=place)
    lines = audit_view.lines(caller.session, search, before=before, limit=limit)
    return {
        "events": [
            {
                "id": line.event.id, "at": shapes.moment(line.event.at), "actor": line.event.actor, "who": line.who,
                "action": line.event.action, "subject": line.event.subject, "about": line.about,
                "detail": line.event.detail, "redacted": line.event.redacted_at is not None,
            }
            for line in lines
        ]
    }  # fmt: skip


@router.get("/audit/verdict")
def audit_verdict(caller: Admin) -> dict[str, Any]:
    """Walk the whole chain: whether it holds, and where it breaks."""
    caller.everywhere()
    verdict = audit.verify(caller.session)
    return {**verdict._asdict(), "intact": verdict.intact}


@router.get("/audit/export")
def audit_export(request: Request, caller: Admin) -> Streamed:
    """The log as hashed, oldest first, one JSON object a line."""
    caller.everywhere()
    audit.record(caller.session, caller.actor, "audit.export", "audit")
    sessions = cast(Sessions, request.app.state.sessions)

    def lines() -> Generator[str]:
        with sessions() as session:
            for row in audit_view.export(session, audit_view.Search()):
                yield json.dumps(row, ensure_ascii=False) + "\n"

    return Streamed(lines(), "application/jsonl")
