"""Commands on artefacts: taking a speculator to another server."""

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from services import exports
from services.cli_client import AdminClient
from services.errors import InvalidRequest, WhetError
from services.settings import Settings

LEARNING = "Learning"
artifact_app = typer.Typer(no_args_is_help=True, help="Artefacts: take a speculator to another server.")


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the `whet` application."""
    app.add_typer(artifact_app, name="artifact", rich_help_panel=LEARNING)


@artifact_app.callback()
def _group() -> None:
    """A group of commands, even while it has only one."""


@artifact_app.command("export")
def export(
    digest: Annotated[str, typer.Argument(help="The speculator's digest, or its beginning.")],
    to: Annotated[str, typer.Option("--to", help="lorax or vllm-medusa")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    model: Annotated[str, typer.Option(help="The base model's name on that server; this one's when left out.")] = "",
) -> None:
    """Write heads as another server loads them, and say what is lost."""
    if to not in exports.WEIGHTS:
        raise InvalidRequest(f"--to is {' or '.join(exports.WEIGHTS)}, not {to!r}")
    settings = Settings()
    config = json.loads((settings.model_path / "config.json").read_text(encoding="utf-8"))
    exported = exports.export(
        settings.artifacts,
        digest,
        cast(exports.Target, to),
        out,
        model=model or settings.model,
        vocabulary=int(config["vocab_size"]),
    )
    console = Console(highlight=False)
    for sentence in exported.lost:
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(f"written to {exported.directory}", markup=False, soft_wrap=True)
    console.print(_noted(exported.digest, to), markup=False, soft_wrap=True)


def _noted(digest: str, to: str) -> str:
    """Ask the platform to write it into its audit log. Exporting works without one, and then says so."""
    try:
        AdminClient(Settings()).post(f"/api/artifacts/{digest}/exports", {"to": to})
    except WhetError as error:
        return f"not noted in the audit log: {error.message}"
    return "noted in the audit log"
