"""Commands on webhooks: who is told of a project's events."""

from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli_client import AdminClient
from services.settings import Settings

LEARNING = "Learning"
Project = Annotated[str, typer.Argument(help="The project's slug.")]
Hook = Annotated[UUID, typer.Argument(help="The webhook's id, as `list` shows it.")]
webhook_app = typer.Typer(no_args_is_help=True, help="Webhooks: who is told of a project's events.")


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the `whet` application."""
    app.add_typer(webhook_app, name="webhook", rich_help_panel=LEARNING)


@webhook_app.command("list")
def webhook_list(project: Project) -> None:
    """Every webhook of a project."""
    table = _table("webhook", "url", "events", "state")
    for row in _get(project)["webhooks"]:
        state = f"disabled: {row['disabled_reason']}" if row["disabled_at"] else "on"
        table.add_row(row["id"], escape(row["url"]), ", ".join(row["events"]), escape(state))
    Console(highlight=False).print(table)


@webhook_app.command("create")
def webhook_create(
    project: Project,
    url: Annotated[str, typer.Argument(help="An https address.")],
    event: Annotated[list[str] | None, typer.Option(help="Which events; without it, all of them.")] = None,
) -> None:
    """Tell this address of events. Prints the secret, once."""
    made = _client().post(f"/api/p/{project}/webhooks", {"url": url} | ({"events": event} if event else {}))
    _say(f"webhook {made['id']} is told of {', '.join(made['events'])}")
    _say(f"secret, shown this once: {made['secret']}")


@webhook_app.command("rotate")
def webhook_rotate(
    project: Project,
    webhook: Hook,
    at_once: Annotated[bool, typer.Option("--at-once", help="The old secret signs nothing any more.")] = False,
) -> None:
    """Make a new secret. The old one signs beside it for a day."""
    made = _client().post(f"{_path(project, webhook)}/rotate", {"at_once": at_once})
    _say(f"secret, shown this once: {made['secret']}")


@webhook_app.command("test")
def webhook_test(project: Project, webhook: Hook) -> None:
    """Send an event that says nothing."""
    sent = _client().post(f"{_path(project, webhook)}/test")
    _say(f"delivery {sent['id']} is on its way; `whet webhook deliveries` shows what became of it")


@webhook_app.command("disable")
def webhook_disable(
    project: Project, webhook: Hook, reason: Annotated[str, typer.Option(help="Why.")] = "whet webhook disable"
) -> None:
    """Send nothing more; what is on its way is cancelled."""
    _client().post(f"{_path(project, webhook)}/disable", {"reason": reason})
    _say(f"webhook {webhook} is disabled")


@webhook_app.command("enable")
def webhook_enable(project: Project, webhook: Hook) -> None:
    """Send again from the next event on."""
    _client().post(f"{_path(project, webhook)}/enable")
    _say(f"webhook {webhook} is on")


@webhook_app.command("delete")
def webhook_delete(project: Project, webhook: Hook) -> None:
    """Forget it and the record of its deliveries."""
    _client().delete(_path(project, webhook))
    _say(f"webhook {webhook} is gone")


@webhook_app.command("deliveries")
def webhook_deliveries(project: Project, webhook: Hook) -> None:
    """What became of each event, newest first."""
    table = _table("delivery", "event", "when", "tries", "state", "answer")
    for row in _client().get(f"{_path(project, webhook)}/deliveries")["deliveries"]:
        answer = row["error"] or row["status"] or ""
        table.add_row(
            row["id"], row["event"], row["created_at"][:19], str(row["attempts"]), row["state"], escape(str(answer))
        )  # fmt: skip
    Console(highlight=False).print(table)


@webhook_app.command("resend")
def webhook_resend(project: Project, webhook: Hook, delivery: UUID) -> None:
    """Send the same event again, under the same id."""
    _client().post(f"{_path(project, webhook)}/deliveries/{delivery}/resend")
    _say(f"delivery {delivery} is on its way")


def _client() -> AdminClient:
    return AdminClient(Settings())


def _get(project: str) -> dict[str, Any]:
    return _client().get(f"/api/p/{project}/webhooks")


def _path(project: str, webhook: UUID) -> str:
    return f"/api/p/{project}/webhooks/{webhook}"


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="dim", padding=(0, 2, 0, 0))


def _say(sentence: str) -> None:
    Console(highlight=False).print(sentence, markup=False, soft_wrap=True)
