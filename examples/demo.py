"""`make demo`: the whole loop in a temporary home, with a live display, ending in a table and a picture."""

import argparse
import signal
import sys
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import func, select

from examples.loop.drive import LoopError, Plan, Progress, run_loop, wait_shipped
from examples.loop.people import App
from examples.loop.picture import draw
from examples.loop.platform import Platform, PlatformError, platform
from examples.loop.report import Gaps, Report, collect
from examples.loop.turbo import Turbo
from services.settings import Settings
from services.store.base import make_sessions
from services.store.models import Interaction, Project

ROOT = Path(__file__).parents[1]
# Prompts timed at each stage, a third of them without drafts.
PROBES = 24
STAGES = {
    "start": "start Postgres, Redis, engine, gateway, console, worker",
    "review": "two reviewers correct live answers",
    "train": "revision, preflight, LoRA",
    "evaluate": "gate: candidate against what serves",
    "deploy": "verified, flipped",
    "serving": "traffic on the new weights",
    "heads": "Turbo: heads trained for the new weights",
    "trial": "Turbo: heads tried on a share of the traffic",
}
STAGE_OF_PHASE = {"evaluating": "evaluate", "refused": "evaluate", "staging": "deploy", "live": "deploy"}


class Display:
    """One line a stage: what it is, how far it is, how long it took."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._progress: dict[str, Progress] = {}
        self._current = ""

    def tell(self, progress: Progress) -> None:
        if progress.stage == "probe":
            return
        stage = progress.stage if progress.stage in STAGES else STAGE_OF_PHASE.get(progress.stage, "train")
        self._started.setdefault(stage, time.monotonic())
        self._progress[stage] = progress
        self._current = stage

    def __rich__(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        begun = list(self._started)
        for stage, words in STAGES.items():
            if stage not in self._started:
                grid.add_row(Text("○", style="dim"), Text(words, style="dim"), "", "")
                continue
            after = begun.index(stage) + 1
            ended = self._started[begun[after]] if after < len(begun) else time.monotonic()
            done = stage != self._current
            mark = Text("●", style="green" if done else "yellow")
            grid.add_row(mark, words, "" if done else self._bar(stage), f"{ended - self._started[stage]:5.0f} s")
        return Group(Text(), grid)

    def _bar(self, stage: str) -> Table:
        progress = self._progress[stage]
        cells = Table.grid(padding=(0, 1))
        label = progress.stage if stage in ("train", "evaluate", "deploy") else ""
        if progress.total:
            cells.add_row(
                ProgressBar(progress.total, progress.done, width=24), f"{progress.done}/{progress.total} {label}"
            )
        else:
            cells.add_row(ProgressBar(None, pulse=True, width=24), label)
        return cells


def main() -> int:
    """Returns 0 when the loop closed, 1 when it did not, 2 when the gate refused the candidate."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="where table and picture go")
    parser.add_argument("--publish", action="store_true", help="also put them into README.md and docs/")
    options = parser.parse_args()
    # Being told to end must still stop the platform, which lives in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    console.print("[bold]Whet[/bold]  serve, log, review, learn, hot-swap, while traffic goes on", highlight=False)
    try:
        report, app = _loop(console)
    except (LoopError, PlatformError, LookupError) as error:
        console.print(f"[red]The loop did not close:[/red] {error}", highlight=False, markup=True)
        return 1
    _show(console, report, app)
    _save(report, app, options.out, publish=options.publish)
    console.print(f"Picture: {options.out / 'demo.svg'} and demo.png", highlight=False)
    return 0 if report.swapped_at else 2


def _loop(console: Console) -> tuple[Report, App]:
    display = Display()
    plan = Plan(probe=PROBES)
    with Live(display, console=console, refresh_per_second=4):
        display.tell(Progress("start", 0, 0))
        with platform() as running:
            run_id, app = run_loop(running, plan, display.tell)
            sessions = make_sessions(_settings(running).database_dsn)
            with sessions() as session:
                rows = (
                    select(func.count())
                    .select_from(Interaction)
                    .join(Project, Project.id == Interaction.project_id)
                    .where(Project.slug == plan.application)
                )
                wait_shipped(lambda: session.scalar(rows) or 0, app.counts.sent - app.counts.failed)
                return collect(session, run_id, plan.application), app


def _settings(running: Platform) -> Settings:
    return Settings(home=running.home)


def _show(console: Console, report: Report, app: App) -> None:
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, value in rows(report, app):
        table.add_row(Text(name, style="bold"), value)
    console.print()
    console.print(table, highlight=False)
    console.print()
    for reason in report.reasons:
        console.print(f"  gate: {reason}", highlight=False, markup=False)
    if report.swapped_at is None:
        console.print("[yellow]The gate refused the candidate; the base model goes on serving.[/yellow]")
    for error in app.counts.errors:
        console.print(f"  client error: {error}", style="red", markup=False)


def rows(report: Report, app: App) -> list[tuple[str, str]]:
    """The table: names and values, all from `report` and the client's own counts."""
    live = report.seconds_to_live
    return [
        ("house rules followed, held-out prompts, before", str(report.held_out_before)),
        ("house rules followed, held-out prompts, after", str(report.held_out_after)),
        ("house rules followed, live traffic, before", str(report.traffic_before)),
        ("house rules followed, live traffic, after", str(report.traffic_after)),
        ("learned from", f"{report.train_examples} training examples, {report.corrections} corrections in all"),
        ("requests sent / failed", f"{app.counts.sent:,} / {app.counts.failed}"),
        ("requests in Postgres / not finished well", f"{report.rows:,} / {report.rows_not_finished_well}"),
        ("p99 longest pause in a stream, around the swap", _gap(report.gaps_swap)),
        ("p99 longest pause in a stream, while training", _gap(report.gaps_training)),
        ("p99 longest pause in a stream, otherwise", _gap(report.gaps_elsewhere)),
        ("weights served, before → after", f"{_short(report.digest_before)} → {_short(report.digest_after)}"),
        ("last correction → live", "not deployed" if live is None else f"{live:.0f} s"),
        ("gate", report.decision),
        *turbo_rows(report.turbo),
    ]


def turbo_rows(turbo: Turbo) -> list[tuple[str, str]]:
    """Decode rates of one stream: medians, quartiles, and beside them those of the same time without drafts."""
    named = [(f"tokens/s of one stream, {stage.title}", str(stage.rates)) for stage in turbo.stages]
    return [
        *named,
        ("tokens/s a stream in live traffic, base", str(turbo.before)),
        ("tokens/s a stream in live traffic, adapter", str(turbo.after)),
        ("heads", turbo.heads),
    ]


def _gap(gaps: Gaps) -> str:
    return f"{gaps.p99_ms:.0f} ms ({gaps.streams:,} streams)" if gaps.streams else "no streams"


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "base"


def _save(report: Report, app: App, out: Path, *, publish: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    draw(report, out / "demo.svg")
    draw(report, out / "demo.png")
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows(report, app))]
    table = "\n".join(lines) + "\n"
    (out / "demo.md").write_text(table)
    if publish:
        draw(report, ROOT / "docs" / "demo.svg")
        readme = ROOT / "README.md"
        head, rest = readme.read_text().split("<!-- demo:begin -->")
        tail = rest.split("<!-- demo:end -->")[1]
        readme.write_text(f"{head}<!-- demo:begin -->\n{table}<!-- demo:end -->{tail}")


if __name__ == "__main__":
    sys.exit(main())
