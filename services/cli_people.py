"""Commands for people who are here already: roles, invitations, sessions, leaving, and the audit log."""

from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli_client import AdminClient
from services.errors import Conflict, NotFound
from services.settings import Settings

PANEL = "Projects, people and keys"
invitation_app = typer.Typer(no_args_is_help=True, help="Invitations: one-time links with a role.")
audit_app = typer.Typer(no_args_is_help=True, help="The audit log: who did what.")
OnProject = Annotated[str | None, typer.Option("--project", help="A project's slug; without it, all projects.")]
Who = Annotated[str, typer.Argument(help="An e-mail address or an account's id.")]


def add_commands(app: typer.Typer, users: typer.Typer) -> None:
    """Put the commands on the `whet` application and its group `user`."""
    app.add_typer(invitation_app, name="invitation", rich_help_panel=PANEL)
    app.add_typer(audit_app, name="audit", rich_help_panel=PANEL)
    for name, command in (
        ("list", user_list), ("role", user_role), ("remove", user_remove), ("disable", user_disable),
        ("enable", user_enable), ("delete", user_delete), ("sessions", user_sessions), ("end", user_end),
    ):  # fmt: skip
        users.command(name)(command)


# --- people -----------------------------------------------------------------------------------------------


def user_list() -> None:
    """Everybody, with their roles."""
    table = _table("e-mail", "name", "roles", "shut")
    for row in _client().get("/api/users")["users"]:
        held = ", ".join(f"{one['role']} on {one['project'] or 'all projects'}" for one in row["roles"])
        table.add_row(escape(row["email"]), escape(row["name"]), held, (row["disabled_at"] or "")[:19])
    Console().print(table)


def user_role(email: Who, role: str, project: OnProject = None) -> None:
    """Give somebody a role, or another one."""
    client = _client()
    client.put(f"/api/users/{_user_id(client, email)}/roles", {"role": role, "project": project})
    _say(f"{email} is {role} on {project or 'all projects'}")


def user_remove(email: Who, project: OnProject = None) -> None:
    """Take a role away; access ends at once."""
    client = _client()
    client.put(f"/api/users/{_user_id(client, email)}/roles", {"role": None, "project": project})
    _say(f"{email} has no role on {project or 'all projects'} any more")


def user_disable(email: Who) -> None:
    """Shut an account: sessions end, roles stay."""
    client = _client()
    client.post(f"/api/users/{_user_id(client, email)}/disable")
    _say(f"the account of {email} is shut")


def user_enable(email: Who) -> None:
    """Open a shut account again."""
    client = _client()
    client.post(f"/api/users/{_user_id(client, email)}/enable")
    _say(f"the account of {email} is open; `whet user link` makes a sign-in link")


def user_delete(email: Who, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete somebody for good: name and address are erased, judgements stay under a pseudonym."""
    client = _client()
    user_id = _user_id(client, email)
    if not yes and not typer.confirm(f"Delete {email} for good?"):
        raise Conflict("nothing was deleted")
    _say(f"deleted; what they judged is by {client.delete(f'/api/users/{user_id}')['name']}")


def user_sessions(email: Who) -> None:
    """Where somebody is signed in."""
    client = _client()
    table = _table("id", "device", "signed in", "last seen")
    for row in client.get(f"/api/users/{_user_id(client, email)}")["sessions"]:
        table.add_row(row["id"], escape(row["device"]), row["created_at"][:19], (row["last_seen_at"] or "")[:19])
    Console().print(table)


def user_end(session: UUID) -> None:
    """End a session: that browser is signed out at once."""
    _client().delete(f"/api/sessions/{session}")
    _say("that browser is signed out")


def _user_id(client: AdminClient, who: str) -> UUID:
    try:
        return UUID(who)
    except ValueError:
        rows = client.get("/api/users")["users"]
    found = [row["id"] for row in rows if row["email"] == who.strip().lower()]
    if not found:
        raise NotFound(f"there is no account {who}: `whet user list` shows them")
    return UUID(found[0])


# --- invitations ------------------------------------------------------------------------------------------


@invitation_app.command("create")
def invitation_create(
    email: str,
    role: Annotated[str, typer.Option(help="viewer, reviewer, lead, operator or admin.")] = "reviewer",
    name: Annotated[str, typer.Option(help="What others read.")] = "",
    days: Annotated[int, typer.Option(help="How long the link works.")] = 7,
    project: OnProject = None,
) -> None:
    """Make a link that makes an account with this role, once."""
    body = {"email": email, "role": role, "name": name, "days": days, "project": project}
    _say(_client().post("/api/invitations", body)["url"])


@invitation_app.command("list")
def invitation_list() -> None:
    """Who is invited, and where that stands."""
    table = _table("id", "e-mail", "role", "project", "state", "ends")
    for row in _client().get("/api/invitations")["invitations"]:
        place = row["project"] or "all projects"
        table.add_row(row["id"], escape(row["email"]), row["role"], place, row["state"], row["expires_at"][:19])
    Console().print(table)


@invitation_app.command("revoke")
def invitation_revoke(invitation: UUID) -> None:
    """End a link before it is used."""
    _say(f"the invitation of {_client().delete(f'/api/invitations/{invitation}')['email']} is revoked")


# --- the audit log ----------------------------------------------------------------------------------------


@audit_app.command("show")
def audit_show(
    who: Annotated[str, typer.Option(help="Part of a name, an address or a key.")] = "",
    action: Annotated[str, typer.Option(help="Such as role.give.")] = "",
    project: OnProject = None,
    limit: Annotated[int, typer.Option(help="How many events.")] = 20,
) -> None:
    """The newest events."""
    table = _table("#", "when", "who", "did", "to")
    for row in _client().get("/api/audit", project=project or "", who=who, action=action, limit=limit)["events"]:
        table.add_row(str(row["id"]), row["at"][:19], escape(row["who"]), row["action"], escape(row["about"]))
    Console().print(table)


@audit_app.command("verify")
def audit_verify() -> None:
    """Walk the chain of hashes; exit code 1 when it is broken."""
    found: dict[str, Any] = _client().get("/api/audit/verdict")
    if not found["intact"]:
        raise Conflict(f"the chain is broken at event {found['broken_id']}, after {found['rows']} that hold")
    _say(f"{found['rows']} events hold, {found['redacted']} of them redacted; last hash {found['last_hash']}")


@audit_app.command("export")
def audit_export() -> None:
    """The whole log as JSON lines on standard output."""
    for line in _client().lines("/api/audit/export"):
        typer.echo(line)


def _client() -> AdminClient:
    return AdminClient(Settings())


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="dim", padding=(0, 2, 0, 0))


def _say(sentence: str) -> None:
    Console(highlight=False).print(sentence, markup=False, soft_wrap=True)
