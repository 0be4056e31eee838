"""The cells of benchmarks/speculation.py as a Markdown table, with the goal of each and whether it was reached."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import publish as pages

BEGIN, END = "<!-- speculation:begin -->", "<!-- speculation:end -->"
RESULTS = Path(__file__).parent / "results"
AFTER = {50: 1.3, 500: 1.8}
AFTER_ALL, WARM_GOAL = 3.0, 2.0
CROWD = {4: 2.0, 16: 1.4}
NEVER_COSTS = 0.95
MOST_MEGABYTES, MOST_SECONDS, MOST_PAUSE_MS = 64, 180, 50
# A corpus that is full takes no more when more comes.
CONSTANT = 1.01

Found = Mapping[str, Any]


class Line(NamedTuple):
    """One line of the table."""

    what: str
    goal: str
    found: str
    reached: bool


def lines(cells: Mapping[str, Found]) -> Iterator[Line]:
    """What was measured, in the order of the names."""
    for name, cell in cells.items():
        kind, *rest = name.split()
        if kind == "single":
            goal = WARM_GOAL if rest[1] == "at" else AFTER.get(int(rest[-1]), AFTER_ALL)
            drafters = "suffix and heads" if cell["heads"] else "suffix"
            words = "greedy" if rest[1] == "greedy" else f"temperature {rest[2]}"
            yield _rate(f"one stream, `{rest[0]}`, {words}, after {int(rest[-1]):,} requests ({drafters})", cell, goal)
        elif kind == "crowd":
            goal = CROWD.get(int(rest[0]), 0.0)
            what = f"{rest[0]} streams of the three applications"
            yield _rate(what, cell, goal) if goal else _never(what, cell)
        elif kind == "unpredictable":
            yield _never(f"random weights at temperature 1, {_streams(rest[0])}", cell)
        elif kind == "hindsight":
            names = "three applications" if rest[0] == "mixed" else f"`{rest[0]}`"
            best = f"best fixed choice in hindsight ({cell['best']})"
            yield _never(f"policy ÷ {best}, {names}, {_streams(rest[1])}", cell)
        else:
            yield OTHERS[name](cell)


def _mixed(cell: Found) -> Line:
    what = "3 projects, 3 adapters, 3 speculators in one batch ÷ one at a time, tokens/s"
    return Line(what, f"≥ {NEVER_COSTS}", _ratio(cell), cell["ratio"] >= NEVER_COSTS)


def _swaps(cell: Found) -> Line:
    lost = cell["failed"] + cell["refused"]
    found = f"{lost} failed, {cell['wrong']} wrong, {cell['added_ms']:+.1f} ms on {cell['control_ms']:.1f}"
    what = f"{cell['swaps']} swaps under load: requests, tokens, p99 of streams' longest pauses over control's"
    fine = not lost and not cell["wrong"] and cell["added_ms"] < MOST_PAUSE_MS
    return Line(what, f"0, 0, < {MOST_PAUSE_MS} ms", found, fine)


def _memory(cell: Found) -> Line:
    found = f"{cell['megabytes']:.0f} MB, then {cell['later']:.0f} MB"
    fine = cell["later"] <= MOST_MEGABYTES and cell["later"] <= CONSTANT * cell["megabytes"]
    what = "suffix corpus of 1 M random tokens, and after 1 M more"
    return Line(what, f"≤ {MOST_MEGABYTES} MB, constant", found, fine)


def _training(cell: Found) -> Line:
    seconds = {name: one["seconds"] for name, one in cell["applications"].items()}
    found = ", ".join(f"`{name}` {value:.0f} s" for name, value in seconds.items())
    refused = [name for name, one in cell["applications"].items() if one["promote"] is False]
    told = f"; the gate refused {', '.join(refused)}" if refused else ""
    what = "trigger → heads in their slot: log read, trained, judged, loaded"
    return Line(what, f"≤ {MOST_SECONDS} s", found + told, max(seconds.values()) <= MOST_SECONDS and not refused)


OTHERS = {"mixed batch": _mixed, "swaps": _swaps, "memory": _memory, "training": _training}


def _rate(what: str, cell: Found, goal: float) -> Line:
    drafted = f"{cell['drafted']:.1f} drafted a token, {100 * cell['accepted']:.0f} % accepted"
    extra = f"; {cell['tokens_per_step']:.1f} tokens a step, {drafted}; end to end {cell['end_to_end']:.2f}"
    return Line(what, f"≥ {goal}", _ratio(cell) + extra, cell["ratio"] >= goal)


def _never(what: str, cell: Found) -> Line:
    return Line(what, f"lower bound ≥ {NEVER_COSTS}", _ratio(cell), cell["low"] >= NEVER_COSTS)


def _streams(number: str) -> str:
    return "one stream" if number == "1" else f"{number} streams"


def _ratio(cell: Found) -> str:
    return f"**{cell['ratio']:.2f}** [{cell['low']:.2f}, {cell['high']:.2f}]"


def render(setting: Found, cells: Mapping[str, Found]) -> str:
    """The table with what it was measured on."""
    host = f"{setting['cpus']} cores of {setting['cpu']} ({', '.join(setting['features'])})"
    commits = ", ".join(pages.unique(str(cell["commit"]) for cell in cells.values()))
    head = (
        f"Decode rate with drafts ÷ without, in turns on the same held-out prompts; {setting['pairs']} pairs a cell, "
        f"{setting['singles']} of single streams, 95 % intervals. {host}, {setting['dtype']} on {setting['kernels']}, "
        f"{setting['measured'][:10]}, commit {commits}. `{setting['command']}`\n\n"
    )
    rows = [["What", "Goal", "Measured", ""]]
    rows += [[one.what, one.goal, one.found, "✓" if one.reached else "missed"] for one in lines(cells)]
    return head + pages.table(rows) + "\n"


def publish(setting: Found, cells: Mapping[str, Found]) -> None:
    """Write the records, the page, and the part of README between its markers. Raises ValueError without markers."""
    RESULTS.mkdir(exist_ok=True)
    text = render(setting, cells)
    record = json.dumps({"setting": setting, "cells": cells}, indent=1)
    (RESULTS / f"speculation-{setting['measured'][:10]}.json").write_text(record + "\n")
    (RESULTS / "speculation.md").write_text(text)
    pages.README.write_text(pages.between_markers(pages.README.read_text(), text, BEGIN, END))
