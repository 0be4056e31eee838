"""The `whet` command: run the platform or one of its parts, and work with it over the admin API."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console
from typer.core import TyperGroup

from services import (
    cli_access,
    cli_artifacts,
    cli_datasets,
    cli_erase,
    cli_instant,
    cli_learning,
    cli_people,
    cli_rollout,
    cli_webhooks,
)
from services.errors import WhetError
from services.platform import doctor as doctor_module
from services.platform import models, parts, up
from services.platform.screen import Screen
from services.settings import Settings


class Sentences(TyperGroup):
    """Expected failures become one sentence on standard error and exit code 1, never a traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer keeps its context type private
        try:
            return super().invoke(ctx)
        except WhetError as error:
            message = error.message
        except ValidationError as error:
            message = "\n".join(_setting_error(item) for item in error.errors())
        except ValueError as error:
            message = str(error)
        Console(stderr=True, highlight=False).print(message, style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1)


def _setting_error(item: ErrorDetails) -> str:
    name = "_".join(str(part) for part in item["loc"])
    sentence = str(item["msg"]).removeprefix("Value error, ")
    setting = f"WHET_{name.upper()}" if name and not name.isupper() else name
    return sentence if setting in sentence else f"{setting}: {sentence}"


app = typer.Typer(
    cls=Sentences,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Whet: inference that sharpens with use. `whet up` starts everything on this machine.",
)
cli_learning.add_commands(app)
cli_datasets.add_commands()
cli_rollout.add_commands(app)
cli_artifacts.add_commands(app)
cli_instant.add_commands(app)
cli_erase.add_commands(app)
cli_webhooks.add_commands(app)
cli_access.add_commands(app)
cli_people.add_commands(app, cli_access.user_app)

PLATFORM = "Platform"
PARTS = "Parts (started by `whet up`, or one each in containers)"
Home = Annotated[Path | None, typer.Option("--home", help="Data directory.", show_default=False)]


@app.command("up", rich_help_panel=PLATFORM)
def up_command(
    home: Home = None,
    model: Annotated[str | None, typer.Option(help="`starter`, a directory, or a Hugging Face id.")] = None,
    gateway_port: Annotated[int | None, typer.Option(help="Port of the API; 0 takes a free one.")] = None,
    console_port: Annotated[int | None, typer.Option(help="Port of the console; 0 takes a free one.")] = None,
) -> None:
    """Start the whole platform and print a sign-in link and an API key. Ctrl-C stops it."""
    _set(WHET_HOME=home and home.absolute(), WHET_MODEL=model)
    _set(WHET_GATEWAY_PORT=gateway_port, WHET_CONSOLE_PORT=console_port)
    settings = Settings()
    models.ensure(settings)
    up.run(settings, Screen())


@app.command(rich_help_panel=PLATFORM)
def doctor(home: Home = None) -> None:
    """What runs, versions, sockets, disk, threads, GPU. Exit code 1 when something is wrong."""
    _set(WHET_HOME=home and home.absolute())
    console = Console(highlight=False)
    healthy = doctor_module.examine(Settings(), console)
    raise typer.Exit(0 if healthy else 1)


@app.command(rich_help_panel=PLATFORM)
def migrate(
    direction: Annotated[str, typer.Argument(help="upgrade or downgrade")] = "upgrade",
    revision: Annotated[str, typer.Argument(help="where to stop")] = "head",
) -> None:
    """Bring the database's tables up to date (or back)."""
    _become((sys.executable, "-m", "migrations.run", direction, revision), {})


def _set(**values: object) -> None:
    """Options win over the environment, and every process started from here sees them."""
    os.environ |= {name: str(value) for name, value in values.items() if value is not None}


def _become(command: tuple[str, ...], environment: dict[str, str], nice: int = 0) -> None:
    os.nice(nice)
    os.execve(command[0], command, {**os.environ, **environment})


def _add_part(name: str, help_text: str, environment: dict[str, str], nice: int = 0) -> None:
    def run(context: typer.Context) -> None:
        _become((*parts.commands(Settings())[name], *context.args), environment, nice)

    run.__doc__ = help_text
    passing_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, rich_help_panel=PARTS, context_settings=passing_on)(run)


_PARTS: list[tuple[str, str, dict[str, str], int]] = [
    ("engine", "Run the engine: the model behind a socket.", parts.TORCH_ENVIRONMENT, 0),
    ("gateway", "Run the gateway: the OpenAI-compatible API.", {}, 0),
    ("shipper", "Run the shipper: logged answers to Postgres.", {}, 0),
    ("console", "Run the console: pages and the admin API.", {}, 0),
    ("dispatcher", "Run the dispatcher: schedules and due jobs.", {}, 0),
    (
        "worker",
        "Run a worker; with --queue train one for trainings.",
        parts.WORKER_ENVIRONMENT,
        parts.WORKER_NICE,
    ),
]
for _part in _PARTS:
    _add_part(*_part)


def main(run: Callable[[], None] = app) -> None:
    """`python -m services.cli`."""
    run()


if __name__ == "__main__":
    main()
