"""What the console takes on a large log: search, review as felt, submits, pages, the build of a large revision.

`python -m benchmarks.review --home DIR [--publish]` measures on the home that `python -m benchmarks.review_world` has
filled. Everything goes through the real console over HTTP, with the engine beside it, on this machine's cores; the
clients run on the same ones. `--only search_words,queue_page` measures these alone, and keeps what was measured before:
the table can be measured in pieces. `--only ""` measures nothing and writes what was kept.
"""

import json
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import machine, review_cells
from benchmarks import publish as pages
from benchmarks.review_cells import Cell
from benchmarks.review_platform import Served, home_database, served
from benchmarks.review_world import GOLDEN, TAUGHT, bars, fill_golden
from services.store.base import Sessions

BEGIN, END = "<!-- review:begin -->", "<!-- review:end -->"
RESULTS = Path(__file__).parent / "results"
EXAMPLES = 50_000


class Goal(NamedTuple):
    """A line of the table: what, and the most it may take of which figure, in which unit."""

    what: str
    most: float
    figure: str = "p95"
    unit: str = "ms"


GOALS: dict[str, Goal] = {
    "next_item": Goal("next item as felt in a browser", 50),
    "submit": Goal("submit acknowledged, 8 reviewers at once", 150),
    "first_load": Goal("review page, first load with nothing cached", 1000),
    "search_words": Goal("interactions, first page by words", 300),
    "search_meaning": Goal("interactions, first page by meaning", 300),
    "search_both": Goal("interactions, first page by both", 300),
    "search_filtered": Goal("interactions, first page by both and disliked", 300),
    "filters": Goal("interactions, by one filter and no words", 300),
    "rare": Goal("interactions, by a filter that next to nothing fits", 1700),
    "newest": Goal("interactions, newest first", 300),
    "one_page": Goal("one interaction's page", 300),
    "queue_page": Goal("queue page", 500),
    "overview": Goal("overview", 500),
    "datasets": Goal("datasets page, over 50,000 examples", 500),
    "revision": Goal("page of a revision of 50,000 examples", 500),
    "build": Goal("revision of 50,000 examples", 60, "seconds", "s"),
}


def measure(name: str, platform: Served, sessions: Sessions, scale: float) -> dict[str, Cell]:
    """One cell, or the two that one browser gives. `scale` shrinks the number of repetitions; `load` is the machine's
    load average as it began, other people's work included."""
    load = round(os.getloadavg()[0], 1)

    def times(count: int) -> int:
        return max(6, round(count * scale))

    if name in ("next_item", "first_load"):
        felt = review_cells.felt(platform, times(100), times(20))
        return {"next_item": felt.next_item | {"load": load}, "first_load": felt.first_load | {"load": load}}
    taught = review_cells.kept_revision(sessions, TAUGHT) if name == "revision" else ""
    cells: dict[str, Callable[[], Cell]] = {
        "submit": lambda: review_cells.submits(platform, times(40)),
        "search_words": lambda: review_cells.search(platform, sessions, "words", times(300)),
        "search_meaning": lambda: review_cells.search(platform, sessions, "meaning", times(300)),
        "search_both": lambda: review_cells.search(platform, sessions, "both", times(300)),
        "search_filtered": lambda: review_cells.search(platform, sessions, "both", times(300), feedback="negative"),
        "filters": lambda: review_cells.filtered(platform, review_cells.FILTERS, times(169)),
        "rare": lambda: review_cells.filtered(platform, review_cells.RARE, times(40)),
        "one_page": lambda: review_cells.one_page(platform, sessions, times(100)),
        "newest": lambda: review_cells.page(platform, "/interactions", times(100)),
        "queue_page": lambda: review_cells.page(platform, "/queue", times(60)),
        "overview": lambda: review_cells.page(platform, "", times(60)),
        "datasets": lambda: review_cells.page(platform, "/datasets", times(60), TAUGHT),
        "revision": lambda: review_cells.page(platform, taught, times(60), TAUGHT),
    }
    return {name: cells[name]() | {"load": load}}


def measured_build(sessions: Sessions, examples: int) -> Cell:
    """Fills its project first, where it is missing."""
    with bars() as progress:
        fill_golden(sessions, examples=examples, seed=1, progress=progress)
    return review_cells.build(sessions, GOLDEN)


def render(setting: dict[str, Any], cells: dict[str, Cell]) -> str:
    """The table with what it was measured on."""
    host = f"{setting['cpus']} cores of {setting['cpu']}"
    held = ", ".join(f"{count:,} {table.replace('_', ' ')}s" for table, count in setting["rows"].items())
    commits = ", ".join(pages.unique(str(cell["commit"]) for cell in cells.values()))
    loads = [cell["load"] for cell in cells.values() if "load" in cell]
    busy = f"; load average {min(loads):g} to {max(loads):g} as each began" if loads else ""
    head = f"{host}, {setting['measured'][:10]}, commit {commits}; {held}{busy}. `{setting['command']}`\n\n"
    lines = [["What", "Goal", "Measured", ""]]
    for name, goal in GOALS.items():
        if name in cells:
            lines.append([goal.what, f"≤ {goal.most:g} {goal.unit}", *_found(goal, cells[name])])
    return head + pages.table(lines) + "\n"


def _found(goal: Goal, cell: Cell) -> tuple[str, str]:
    value = cell[goal.figure]
    reached = "✓" if max(value, cell.get("first", 0)) <= goal.most else "missed"
    if goal.figure == "seconds":
        return f"**{value:g} s**, {cell['examples']:,} examples kept", reached
    first = f"; the first, with no figure kept, {cell['first']:g} ms" if "first" in cell else ""
    return f"p95 **{value:g} ms**, median {cell['p50']:g} ms, {cell['n']:,} times{first}", reached


def publish(setting: dict[str, Any], cells: dict[str, Cell]) -> None:
    """Write the records, the page, and the part of README between its markers."""
    RESULTS.mkdir(exist_ok=True)
    text = render(setting, cells)
    record = json.dumps({"setting": setting, "cells": cells}, indent=1)
    (RESULTS / f"review-{setting['measured'][:10]}.json").write_text(record + "\n")
    (RESULTS / "review.md").write_text(text)
    pages.README.write_text(pages.between_markers(pages.README.read_text(), text, BEGIN, END))


def main(
    home: Annotated[Path, typer.Option(help="A home that benchmarks.review_world has filled.")],
    only: Annotated[str, typer.Option(help="Cells to measure, by commas.")] = ",".join(GOALS),
    scale: Annotated[float, typer.Option(help="Share of the usual repetitions.")] = 1.0,
    examples: Annotated[int, typer.Option(help="Examples of the revision.")] = EXAMPLES,
    write: Annotated[bool, typer.Option("--publish", help="Write results and README's table.")] = False,
) -> None:
    """Measure, print, and keep what was measured in the home."""
    kept = home / "review-cells.json"
    cells: dict[str, Cell] = json.loads(kept.read_text()) if kept.exists() else {}
    wanted = [name for name in only.split(",") if name]
    unknown = sorted(set(wanted) - set(GOALS))
    if unknown:
        raise typer.BadParameter(f"no cell is called {', '.join(unknown)}; there are {', '.join(GOALS)}")
    with home_database(home) as sessions:
        rows = review_cells.rows(sessions)
        if {"datasets", "revision"} & set(wanted):
            with bars() as progress:
                fill_golden(sessions, slug=TAUGHT, examples=examples, seed=2, progress=progress)
            review_cells.kept_revision(sessions, TAUGHT)
        with served(home, sessions) as platform:
            for name in wanted:
                if name != "build" and not (name == "first_load" and "next_item" in wanted):
                    _keep(kept, cells, measure(name, platform, sessions, scale))
        if "build" in wanted:
            _keep(kept, cells, {"build": measured_build(sessions, examples)})
    setting = {
        **machine.facts(), "measured": datetime.now(UTC).isoformat(), "rows": rows,
        "command": "python -m benchmarks.review --home DIR --publish",
    }  # fmt: skip
    print(render(setting, cells))
    if write:
        publish(setting, cells)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _keep(path: Path, cells: dict[str, Cell], found: dict[str, Cell]) -> None:
    for name, cell in found.items():
        cells[name] = cell | {"commit": _commit(), "measured": datetime.now(UTC).isoformat()}
        print(name, json.dumps(cells[name]), flush=True)
    path.write_text(json.dumps(cells))


if __name__ == "__main__":
    typer.run(main)
