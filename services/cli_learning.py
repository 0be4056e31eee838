"""Commands of the learning loop: train, runs, deployments, heads, datasets, sampling."""

import json
import time
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.cli_client import AdminClient
from services.errors import InvalidRequest
from services.settings import Settings

LEARNING = "Learning"
POLL_SECONDS = 1.0
SPECULATOR_ACTIONS = {"roll-back": "rollback", "retire": "retire", "promote": "promote", "withdraw": "withdraw"}
FINAL = ("succeeded", "failed", "cancelled")
Project = Annotated[str, typer.Argument(help="The project's slug.")]
Name = Annotated[str, typer.Argument(help="The dataset's name.")]
dataset_app = typer.Typer(no_args_is_help=True, help="Golden datasets: build a revision, show what there is.")


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the `whet` application."""
    for function in (train, runs, triggers, override, deployments, speculator, sample):
        app.command(rich_help_panel=LEARNING)(function)
    app.add_typer(dataset_app, name="dataset", rich_help_panel=LEARNING)


def train(
    project: Project,
    dataset: Annotated[str, typer.Option(help="Which dataset to learn from.")] = "golden",
    param: Annotated[
        list[str] | None, typer.Option("--param", "--set", help="name=value, such as epochs=2; repeatable.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="`sft` imitates, `dpo` prefers, `kto` learns from flags; `speculator` trains heads.")
    ] = "sft",
    sweep: Annotated[int, typer.Option(min=0, max=16, help="Candidates tried against each other first.")] = 0,
    follow: Annotated[bool, typer.Option(help="Stay until the run ends.")] = True,
) -> None:
    """Build a revision (or read the log), train, gate and swap. Exit code 1 unless the run succeeds."""
    client = AdminClient(Settings())
    params = parameters(param or []) | ({"sweep": sweep} if sweep else {})
    body = {"params": params, "dataset": dataset, "kind": kind}
    run = client.post(f"/api/p/{project}/runs", body)
    print(f"run {run['id']} started")
    if follow and follow_run(client, run["id"])["state"] != "succeeded":
        raise typer.Exit(1)


def runs(
    run_id: Annotated[UUID | None, typer.Argument(help="Show this run, following it while it works.")] = None,
    project: Annotated[str | None, typer.Option(help="Only this project's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop this run.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Start this run again, once it failed.")] = False,
) -> None:
    """What ran, what was decided and why."""
    client = AdminClient(Settings())
    if run_id is None and (cancel or retry):
        raise InvalidRequest("name the run: `whet runs RUN --cancel`")
    if run_id is not None:
        if cancel:
            client.post(f"/api/runs/{run_id}/cancel")
        follow_run(client, client.post(f"/api/runs/{run_id}/retry")["id"] if retry else str(run_id))
        return
    slugs = [project] if project else [row["slug"] for row in client.get("/api/projects")["projects"]]
    found = [(slug, row) for slug in slugs for row in client.get(f"/api/p/{slug}/runs", limit=limit)["runs"]]
    newest = sorted(found, key=lambda pair: str(pair[1]["created_at"]), reverse=True)[:limit]
    table = print_table("run", "project", "kind", "state", "phase", "adapter", "started", "why")
    for slug, row in newest:
        print_row(
            table, row["id"], slug, row["kind"], row["state"], row["phase"], short(row["artifact_digest"]),
            when(row["created_at"]), row["error"] or "",
        )  # fmt: skip
    print_text(table if newest else "No runs yet: `whet train PROJECT` starts one.")


def triggers(
    project: Project,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="name=value, such as examples=200; `null` sets it back.")
    ] = None,
) -> None:
    """When runs begin by themselves: so many new examples, a schedule, drift."""
    client, path = AdminClient(Settings()), f"/api/p/{project}/triggers"
    found = client.put(path, parameters(change)) if change else client.get(path)
    table = print_table("trigger", "value")
    for name, value in found.items():
        print_row(table, name, str(value) if value or name == "min_minutes" else "never")
    print_text(table)


def deployments(project: Project) -> None:
    """What serves now, and every change with its reason."""
    found = AdminClient(Settings()).get(f"/api/p/{project}/deployment")
    print_text(
        f"[bold]{project}[/bold]  generation {found['generation']}  serves {short(found['active_digest'])}  "
        f"last good {short(found['last_good_digest'])}{'  frozen' if found['frozen'] else ''}"
    )
    table = print_table("when", "generation", "what", "from", "to", "by", "reason")
    for event in found["events"]:
        print_row(
            table, when(event["at"]), str(event["generation"]), event["kind"], short(event["from_digest"]),
            short(event["to_digest"]), event["actor"], event["reason"],
        )  # fmt: skip
    print_text(table)


def override(
    run_id: Annotated[UUID, typer.Argument(help="The run whose adapter the gate refused.")],
    reason: Annotated[str, typer.Option(help="Why you know better; kept with your name, everywhere.")],
    follow: Annotated[bool, typer.Option(help="Stay until the run ends.")] = True,
) -> None:
    """Let an adapter through that the gate refused. Exit code 1 unless the run then succeeds."""
    client = AdminClient(Settings())
    run = client.post(f"/api/runs/{run_id}/override", {"reason": reason})
    print_text(f"overridden: run {run['id']} goes on with {run['phase']}")
    if follow and follow_run(client, run["id"])["state"] != "succeeded":
        raise typer.Exit(1)


def speculator(
    project: Project,
    action: Annotated[str, typer.Argument(help="status, roll-back, retire, promote or withdraw.")] = "status",
    reason: Annotated[str, typer.Option(help="Why; kept in the history.")] = "whet speculator",
) -> None:
    """What drafts, what it earns, and a person's word on it."""
    client, path = AdminClient(Settings()), f"/api/p/{project}/speculator"
    if action == "status":
        _show_speculator(project, client.get(path))
        return
    if action not in SPECULATOR_ACTIONS:
        raise InvalidRequest(f"no action {action!r}: status, {', '.join(SPECULATOR_ACTIONS)}")
    print_text(_drafting(project, client.post(f"{path}/{SPECULATOR_ACTIONS[action]}", {"reason": reason})))


def _show_speculator(project: str, found: dict[str, Any]) -> None:
    print_text(_drafting(project, found))
    if found["gain"]:
        print_text(
            "{times:.2f} times as fast as without drafts ({low:.2f} to {high:.2f}), last day".format(**found["gain"])
        )
    drafters = print_table("drafter", "heads", "drafts", "drafted", "accepted", "a draft")
    for row in found["drafters"]:
        numbers = (str(row["drafts"]), str(row["drafted"]), str(row["accepted"]), f"{row['per_draft']:.2f}")
        print_row(drafters, row["name"], short(row["digest"]) if row["digest"] else "", *numbers)
    if found["drafters"]:
        print_text(drafters)
    events = print_table("when", "what", "from", "to", "by", "reason")
    for event in found["events"]:
        ends = (_heads(event["from_digest"]), _heads(event["to_digest"]))
        print_row(events, when(event["at"]), event["kind"], *ends, event["actor"], event["reason"])
    if found["events"]:
        print_text(events)


def _drafting(project: str, found: dict[str, Any]) -> str:
    tried = f"  tries {_heads(found['canary'])} on {found['share']:.0%}" if found["canary"] else ""
    return f"[bold]{project}[/bold]  drafts with {_heads(found['live'])}{tried}"


def _heads(digest: str | None) -> str:
    """Heads by the beginning of their digest; without any the suffix drafter works alone."""
    return f"heads {digest[:12]}" if digest else "the suffix drafter"


def sample(project: Project) -> None:
    """Choose answers for review now instead of at the next window's end."""
    job = AdminClient(Settings()).post(f"/api/p/{project}/sample")
    print_text(f"job {job['id']} {job['state']}")


@dataset_app.command("build")
def dataset_build(project: Project, name: Name = "golden") -> None:
    """Make a revision from the judgements so far and wait for it."""
    client = AdminClient(Settings())
    job = client.post(f"/api/p/{project}/datasets/{name}/build")
    with Console().status(f"building {project}/{name}"):
        while job["state"] in {"queued", "running"}:
            time.sleep(POLL_SECONDS)
            job = client.get(f"/api/jobs/{job['id']}")
    if job["state"] != "succeeded":
        raise InvalidRequest(f"the build ended as {job['state']}: {job['error']}")
    dataset_show(project, name)


@dataset_app.command("show")
def dataset_show(project: Project, name: Name = "golden") -> None:
    """Revisions, newest first."""
    found = AdminClient(Settings()).get(f"/api/p/{project}/datasets/{name}")
    table = print_table("revision", "train", "held out", "looks", "made")
    for row in found["revisions"]:
        counts = (str(row["train_count"]), str(row["held_out_count"]), str(row["looks"]))
        print_row(table, short(row["digest"]), *counts, when(row["created_at"]))
    print_text(table if found["revisions"] else f"{project}/{name} has no revision yet.")


def follow_run(client: AdminClient, run_id: str) -> dict[str, Any]:
    """Show a run until it ends; the run as it ended."""
    last = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(), transient=True) as progress:
        task = progress.add_task("queued", total=None, numbers="")
        while True:
            run = client.get(f"/api/runs/{run_id}", after=last)
            for event in run["events"]:
                last = event["id"]
                _show_event(progress, task, event)
            if run["state"] in FINAL and not run["events"]:
                break
            time.sleep(POLL_SECONDS if run["state"] not in FINAL else 0)
    made = "heads" if run["kind"] == "speculator" else "adapter"
    print_text(f"[bold]{run['state']}[/bold]: {run['phase']}  {made} {short(run['artifact_digest'])}")
    if run["error"]:
        print_text(run["error"], markup=False)
    decided = run["evaluation"] or {}
    for reason in decided.get("reasons", []):
        print_text(f"  {reason if isinstance(reason, str) else json.dumps(reason)}", markup=False)
    if decided.get("overridden_by"):
        print_text(f"  overridden by {decided['overridden_by']}: {decided['override_reason']}", markup=False)
    return run


def _show_event(progress: Progress, task: TaskID, event: dict[str, Any]) -> None:
    payload = event["payload"]
    if event["kind"] == "phase":
        progress.console.print(f"{when(event['at'])}  {payload['phase']}", highlight=False)
        progress.update(task, description=payload["phase"], total=None, numbers="")
    elif event["kind"] == "trial":
        changed = ", ".join(f"{name} {value:.4g}" for name, value in payload["changes"].items()) or "as asked"
        goes_on = "goes on" if payload["kept"] else "ends here"
        told = f"  candidate {payload['candidate'] + 1} ({changed}): {payload['loss']:.4g} nats a token, {goes_on}"
        progress.console.print(told, markup=False, highlight=False)
    elif event["kind"] == "progress":
        numbers = " ".join(f"{name} {value:.4g}" for name, value in payload.items() if isinstance(value, int | float))
        progress.update(task, completed=event["step"], total=payload.get("steps"), numbers=numbers)
    elif event["kind"] == "gate" and "decision" in payload:
        for reason in payload["reasons"]:
            progress.console.print(f"  {reason}", markup=False, highlight=False)
    elif "line" in payload:
        progress.console.print(str(payload["line"]), markup=False, highlight=False)


def parameters(pairs: list[str]) -> dict[str, Any]:
    """name=value pairs; a value is JSON where it can be, else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise InvalidRequest(f"--param wants name=value, not {pair!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def short(digest: str | None) -> str:
    """The beginning of a digest; no digest is the base model."""
    return digest[:12] if digest else "base"


def when(moment: str | None) -> str:
    """A time as tables show it."""
    return (moment or "")[:19].replace("T", " ")


def print_table(*columns: str) -> Table:
    """Only the last column may wrap: the others hold what people copy."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def print_row(table: Table, *cells: str) -> None:
    """Cells are other people's text: never markup."""
    table.add_row(*map(escape, cells))


def print_text(what: RenderableType, *, markup: bool = True) -> None:
    console = Console(highlight=False)
    # In a pipe there is no width to fit into.
    console.width = console.width if console.is_terminal else 250
    console.print(what, markup=markup, soft_wrap=isinstance(what, str))
