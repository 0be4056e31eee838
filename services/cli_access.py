"""Commands for who may do what: projects, people, API keys."""

from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli_client import AdminClient
from services.errors import NotFound
from services.settings import Settings

ACCESS = "Projects, people and keys"
project_app = typer.Typer(no_args_is_help=True, help="Projects: what `model` names.")
user_app = typer.Typer(no_args_is_help=True, help="People: invite them, give them a new sign-in link.")
key_app = typer.Typer(no_args_is_help=True, help="API keys of apps and engineers.")
OnProject = Annotated[str | None, typer.Option("--project", help="A project's slug; without it, all projects.")]


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the `whet` application."""
    groups = (("project", project_app), ("user", user_app), ("key", key_app))
    for name, group in groups:
        app.add_typer(group, name=name, rich_help_panel=ACCESS)


@project_app.command("create")
def project_create(slug: str, name: Annotated[str, typer.Option(help="What people read.")] = "") -> None:
    """Make a project that serves the base model."""
    made = _client().post("/api/projects", {"slug": slug, "name": name})
    _say(f"project {made['slug']} is there: send it as `model`")


@project_app.command("list")
def project_list() -> None:
    """Every project."""
    table = _table("slug", "name")
    for row in _client().get("/api/projects")["projects"]:
        table.add_row(row["slug"], escape(row["name"]))
    Console().print(table)


@user_app.command("add")
def user_add(
    email: str,
    role: Annotated[str, typer.Option(help="viewer, reviewer, lead, operator or admin.")] = "reviewer",
    name: Annotated[str, typer.Option(help="What others read.")] = "",
    project: OnProject = None,
) -> None:
    """Invite someone, or change their role; prints a sign-in link that works once."""
    body = {"email": email, "name": name, "role": role, "project": project}
    _say(_client().post("/api/users", body)["sign_in_url"])


@user_app.command("link")
def user_link(email: str) -> None:
    """A new sign-in link for someone who has an account; their roles stay as they are."""
    _say(_client().post("/api/users/link", {"email": email})["sign_in_url"])


@key_app.command("create")
def key_create(
    name: str,
    scope: Annotated[list[str], typer.Option(help="infer, feedback, review, train or admin; repeatable.")],
    project: OnProject = None,
    acts_as: Annotated[str | None, typer.Option(help="E-mail of whom the scope review judges as.")] = None,
) -> None:
    """Make a key; it is shown once."""
    body = {"name": name, "scopes": scope, "project": project, "acts_as": acts_as}
    _say(_client().post("/api/keys", body)["key"])


@key_app.command("list")
def key_list() -> None:
    """Keys, newest first, without their secrets."""
    table = _table("id", "name", "scopes", "made", "last used", "ends", "revoked")
    for row in _client().get("/api/keys")["keys"]:
        times = [(row[name] or "")[:19] for name in ("created_at", "last_used_at", "expires_at", "revoked_at")]
        table.add_row(row["prefix"], escape(row["name"]), " ".join(row["scopes"]), *times)
    Console().print(table)


@key_app.command("rotate")
def key_rotate(
    key: Annotated[str, typer.Argument(help="The id in `wh_<id>_…`, or the whole key's UUID.")],
    overlap: Annotated[int, typer.Option(help="Hours the old key lives on.")] = 24,
) -> None:
    """Make a successor with the same scopes; it is shown once, and both work until the old one ends."""
    client = _client()
    made = client.post(f"/api/keys/{_key_id(client, key)}/rotate", {"overlap_hours": overlap})
    _say(made["key"])


@key_app.command("revoke")
def key_revoke(key: Annotated[str, typer.Argument(help="The id in `wh_<id>_…`, or the whole key's UUID.")]) -> None:
    """End a key; gateways know within two seconds."""
    client = _client()
    revoked = client.delete(f"/api/keys/{_key_id(client, key)}")
    _say(f"{revoked['name']} ({revoked['prefix']}) is revoked")


def _key_id(client: AdminClient, key: str) -> UUID:
    try:
        return UUID(key)
    except ValueError:
        rows = client.get("/api/keys")["keys"]
    found = [row["id"] for row in rows if row["prefix"] == key]
    if not found:
        raise NotFound(f"there is no key {key}: `whet key list` shows them")
    return UUID(found[0])


def _client() -> AdminClient:
    return AdminClient(Settings())


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="dim", padding=(0, 2, 0, 0))


def _say(sentence: str) -> None:
    Console(highlight=False).print(sentence, markup=False, soft_wrap=True)
