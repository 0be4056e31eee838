"""`whet erase`: take an end user or a session out of everything, and keep the certificate."""

import json
import time
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.markup import escape

from services.cli_client import AdminClient
from services.errors import InvalidRequest
from services.settings import Settings

ACCESS = "Projects, people and keys"
POLL_SECONDS = 0.5
spool_app = typer.Typer(no_args_is_help=True, help="Log spools of all machines, which erasures wait for.")


def add_commands(app: typer.Typer) -> None:
    """Put the command on the `whet` application."""
    app.command(rich_help_panel=ACCESS)(erase)
    app.add_typer(spool_app, name="spool", rich_help_panel=ACCESS)


def erase(
    end_user: Annotated[str | None, typer.Option(help="The `user` that apps sent.")] = None,
    session: Annotated[str | None, typer.Option(help="The `whet.session` that apps sent.")] = None,
    project: Annotated[str | None, typer.Option(help="Only in this project.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    certificate: Annotated[Path | None, typer.Option(help="Write the certificate to this new file.")] = None,
) -> None:
    """Erase what somebody asked and everything made of it. Shows what there is and asks first."""
    if (end_user is None) == (session is None):
        raise InvalidRequest("name whom to erase: --end-user or --session, one of them")
    if certificate is not None and certificate.exists():
        raise InvalidRequest(f"{certificate} exists; name a new file")
    kind, subject = ("end_user", end_user) if end_user is not None else ("session", session)
    client, console = AdminClient(Settings()), Console(highlight=False)
    body = {"kind": kind, "subject": subject, "project": project}
    _show(console, client.post("/api/erasures/preview", body)["rows"])
    if not yes and not typer.confirm("Erase all of it? This cannot be undone."):
        raise typer.Exit(1)
    done = _follow(console, client, client.post("/api/erasures", body))
    if done["state"] != "done":
        why = f": {done['error']}" if done["error"] else ""
        raise InvalidRequest(f"the erasure {done['id']} has {done['state']}{why}. Take it up again on its page")
    found: dict[str, Any] = done["certificate"]
    _show(console, found["rows"])
    for one in found["tainted"]:
        console.print(f"tainted: {one['kind']} {one['digest'][:12]} ({one['state']}); train again")
    for file in found["exports_not_searched"]:
        console.print(f"not searched: {escape(file)} below exports/ of the home; look yourself")
    if found["exports"]:
        console.print(f"{len(found['exports'])} exports may hold the rows: the certificate names their audit events")
    if certificate is not None:
        certificate.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    console.print(f"done; certificate {found['hash']}", soft_wrap=True)


def _show(console: Console, rows: dict[str, int]) -> None:
    touched = {table: count for table, count in rows.items() if count}
    for table, count in touched.items():
        console.print(f"{count:>9,}  {escape(table)}")
    if not touched:
        console.print("nothing is stored under this name; answers on their way to the log are erased all the same")


def _follow(console: Console, client: AdminClient, made: dict[str, Any]) -> dict[str, Any]:
    with console.status("queued") as status:
        while made["state"] in {"queued", "running"}:
            time.sleep(POLL_SECONDS)
            made = client.get(f"/api/erasures/{made['id']}")
            status.update(escape(str(made["step"])))
    return made


@spool_app.command("list")
def spool_list() -> None:
    """Every spool that a shipper has registered, and when it was last seen."""
    console = Console(highlight=False)
    for one in AdminClient(Settings()).get("/api/spools")["spools"]:
        console.print(f"{one['id']}  {one['seen_at']}  {escape(one['host'])}:{escape(one['path'])}", soft_wrap=True)


@spool_app.command("forget")
def spool_forget(spool: Annotated[UUID, typer.Argument(help="Its id, from `whet spool list`.")]) -> None:
    """Say that a spool's disk is gone, so that erasures wait for it no more."""
    found = AdminClient(Settings()).post(f"/api/spools/{spool}/forget")
    Console(highlight=False).print(f"{escape(found['host'])}:{escape(found['path'])} is forgotten", soft_wrap=True)
