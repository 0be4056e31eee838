"""Commands on what takes effect at once: pinned answers."""

from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli_client import AdminClient
from services.settings import Settings

LEARNING = "Learning"
SHOWN = 60
Project = Annotated[str, typer.Argument(help="The project's slug.")]
pin_app = typer.Typer(no_args_is_help=True, help="Pinned answers: what serves word for word, and withdrawing one.")


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the `whet` application."""
    app.add_typer(pin_app, name="pin", rich_help_panel=LEARNING)


@pin_app.command("list")
def pin_list(
    project: Project, withdrawn: Annotated[bool, typer.Option("--all", help="Withdrawn ones too.")] = False
) -> None:
    """Pinned answers, newest first."""
    found = AdminClient(Settings()).get(f"/api/p/{project}/pins")
    rows = [row for row in found["pins"] if withdrawn or row["state"] != "withdrawn"]
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("pin", no_wrap=True, min_width=36)  # to be given to `withdraw`, whole
    for name in ("state", "served", "approved by", "request", "answer"):
        table.add_column(name)
    for row in rows:
        asked = str(row["messages"][-1].get("content", ""))
        approvers = ", ".join(row["approvers"])
        table.add_row(
            row["id"], row["state"], str(row["hits"]), escape(approvers), _line(asked), _line(row["answer"])
        )  # fmt: skip
    state = "on" if found["pinned_answers"]["enabled"] else "off"
    console = Console(highlight=False)
    console.print(f"pinned answers are {state} for {project}")
    console.print(table if rows else "nothing is pinned")


@pin_app.command("withdraw")
def pin_withdraw(
    project: Project, pin: UUID, reason: Annotated[str, typer.Option(help="Why; kept with the pin.")] = "whet pin"
) -> None:
    """Serve this answer no more; the model answers the request again."""
    AdminClient(Settings()).post(f"/api/p/{project}/pins/{pin}/withdraw", {"reason": reason})
    Console(highlight=False).print(f"pin {pin} is withdrawn")


def _line(text: str) -> str:
    """The beginning of a text, on one line, with nothing a terminal would obey."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return escape(plain[: SHOWN - 1] + "…" if len(plain) > SHOWN else plain)
