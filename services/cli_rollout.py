"""Commands of rollout: what is on trial and what its figures say, a person's word on it, the way back; and the settings
of how candidates reach traffic and of how the gate scores."""

import json
from typing import Annotated, Any

import typer

from services.cli_client import AdminClient
from services.cli_learning import LEARNING, Project, parameters, print_row, print_table, print_text, short, when
from services.errors import InvalidRequest
from services.settings import Settings

ACTIONS = ("status", "begin", "stop", "share", "start", "looked")
Change = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="name=value, such as share=0.2 or 'metrics=[\"field_f1\"]'; repeatable; `null` sets it back."
    ),
]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the `whet` application."""
    for function in (rollback, promote, canary, rollout, gate):
        app.command(rich_help_panel=LEARNING)(function)


def rollback(
    project: Project,
    reason: Reason = "whet rollback",
    live: Annotated[bool, typer.Option("--live", help="Not the canary: what is live.")] = False,
) -> None:
    """Undo the newest change: end the canary, or go back to the last good weights or the base model."""
    body = {"reason": reason, "what": "live" if live else "newest"}
    _show_serving(project, AdminClient(Settings()).post(f"/api/p/{project}/deployment/rollback", body))


def promote(project: Project, reason: Annotated[str, typer.Option(help="Why; kept in the history.")]) -> None:
    """Make the candidate on trial live now, whatever its figures say."""
    _show_serving(project, AdminClient(Settings()).post(f"/api/p/{project}/deployment/promote", {"reason": reason}))


def canary(
    project: Project,
    action: Annotated[str, typer.Argument(help="status, begin, stop, share, start or looked.")] = "status",
    reason: Annotated[str, typer.Option(help="Why; kept in the history. `looked` asks for it.")] = "",
    share: Annotated[float | None, typer.Option(help="Of the users, 0.01 to 0.5.")] = None,
    digest: Annotated[str | None, typer.Option(help="The artefact to start with.")] = None,
) -> None:
    """What is on trial and why it is not decided yet; begin, stop, change the share, start another, or unfreeze."""
    client, path = AdminClient(Settings()), f"/api/p/{project}/deployment"
    body: dict[str, Any] = {"reason": reason}
    match action:
        case "status":
            _show(project, client.get(f"{path}/rollout"))
        case "begin" | "stop":
            _show_serving(project, client.post(f"{path}/canary/{action}", body))
        case "share":
            _show_serving(project, client.post(f"{path}/canary/share", body | {"share": _given(share, "--share")}))
        case "start":
            job = client.post(f"{path}/start", body | {"digest": _given(digest, "--digest")})
            print_text(f"job {job['id']} {job['state']}")
        case "looked":
            _show_serving(project, client.post(f"{path}/looked", body))
        case _:
            raise InvalidRequest(f"no action {action!r}: {', '.join(ACTIONS)}")


def rollout(project: Project, change: Change = None) -> None:
    """How candidates reach traffic: canary or direct, share, signal, shadow, guardrails. Changes hold from the next
    trial on."""
    _settings(project, "rollout", change)


def gate(project: Project, change: Change = None) -> None:
    """How the gate scores: metrics, checks, judge, margins. Changes hold from the next evaluation on."""
    _settings(project, "gate", change)


def _settings(project: str, part: str, change: list[str] | None) -> None:
    client, path = AdminClient(Settings()), f"/api/p/{project}/settings/{part}"
    found = client.put(path, parameters(change)) if change else client.get(path)
    table = print_table("setting", "value")
    for name, value in found.items():
        told = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print_row(table, name, told)
    print_text(table)


def _given(value: Any, option: str) -> Any:  # noqa: ANN401 - whatever the option holds
    if value is None:
        raise InvalidRequest(f"this takes {option}")
    return value


def _show_serving(project: str, found: dict[str, Any]) -> None:
    tried = f", tries {short(found['canary_digest'])} on {found['canary_share']:.0%}" if found["canary_digest"] else ""
    frozen = ", promotion frozen" if found["frozen"] else ""
    print_text(f"{project} serves {short(found['active_digest'])} (generation {found['generation']}){tried}{frozen}")


def _show(project: str, found: dict[str, Any]) -> None:
    _show_serving(project, found)
    rollout = found["rollout"]
    if rollout is None:
        print_text("No candidate has been on trial yet.")
    else:
        _show_rollout(rollout)
    engines = print_table("engine", "generation", "seen", "loaded")
    for one in found["engines"]:
        print_row(
            engines, one["engine"], str(one["generation"]), when(one["seen_at"]), " ".join(map(short, one["digests"]))
        )
    if found["engines"]:
        print_text(engines)


def _show_rollout(rollout: dict[str, Any]) -> None:
    print_text(f"candidate {short(rollout['digest'])}: {rollout['stage'].replace('_', ' ')}")
    if rollout["ending"]:
        print_text(rollout["ending"], markup=False)
    verdict = rollout["verdict"]
    if verdict:
        print_text(verdict["reason"], markup=False)
        if verdict.get("more"):
            print_text(f"about {verdict['more']:,} more requests, if it stays like this")
        guards = print_table("guardrail", "state", "difference")
        for guard in verdict["guards"]:
            interval = guard["interval"]
            told = f"{interval['estimate']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]" if interval else ""
            print_row(guards, guard["words"], guard["state"], told)
        print_text(guards)
