"""The cells of benchmarks/speculation.py as a Markdown table, with the goal of each and whether it was reached."""

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.publish import README

BEGIN, END = "<!-- speculation:begin -->", "<!-- speculation:end -->"
RESULTS = Path(__file__).parent / "results"
AFTER = {50: 1.3, 500: 1.8}
AFTER_ALL, WARM_GOAL = 3.0, 2.0
CROWD = {4: 2.0, 16: 1.4}
NEVER_COSTS = 0.95

Cells = Mapping[str, Mapping[str, Any]]


class Line(NamedTuple):
    """One line of the table."""

    what: str
    goal: str
    found: str
    reached: bool


def lines(cells: Cells) -> Iterator[Line]:
    """What was measured, in the order of the names."""
    for name, cell in cells.items():
        kind, *rest = name.split()
        if kind == "single":
            goal = WARM_GOAL if "at" in rest else AFTER.get(int(rest[-1]), AFTER_ALL)
            yield _rate(f"one stream, `{rest[0]}`, {' '.join(rest[1:])} requests", cell, goal)
        elif kind == "crowd":
            limit = CROWD.get(int(rest[0]))
            what = f"{rest[0]} streams, three applications"
            yield _rate(what, cell, limit) if limit else _never(what, cell)
        elif kind == "unpredictable":
            yield _never(f"random weights at temperature 1, {rest[0]} at once", cell)
        elif kind == "hindsight":
            what = f"policy ÷ best fixed ({cell['best']}), {rest[0]}, {rest[1]} at once"
            yield _never(what, cell)
        else:
            yield from _others(name, cell)


def _others(name: str, cell: Mapping[str, Any]) -> Iterator[Line]:
    if name == "mixed batch":
        reached = cell["ratio"] >= NEVER_COSTS
        yield Line(
            "3 projects, 3 adapters, 3 speculators in one batch ÷ one at a time", "≥ 0.95", _ratio(cell), reached
        )
    elif name == "swaps":
        found = f"{cell['wrong']} wrong, {cell['failed']} failed, {cell['added_ms']:+.1f} ms"
        fine = not cell["wrong"] and not cell["failed"] and cell["added_ms"] < 50
        yield Line(
            f"{cell['swaps']} swaps under load: tokens, p99 longest pause − control's", "0, 0, < 50 ms", found, fine
        )
    elif name == "memory":
        found = f"{cell['megabytes']:.0f} MB, then {cell['later']:.0f} MB"
        yield Line("suffix corpus of 1 M random tokens, and after 1 M more", "≤ 64 MB", found, cell["later"] <= 64)
    elif name == "training":
        worst = max(cell["seconds"].values())
        found = ", ".join(f"`{app}` {seconds:.0f} s" for app, seconds in cell["seconds"].items())
        yield Line("logged requests → trained heads", "≤ 180 s", found, worst <= 180)


def _rate(what: str, cell: Mapping[str, Any], goal: float) -> Line:
    extra = f"; {cell['tokens_per_step']:.1f} tokens a step, end to end {cell['end_to_end']:.2f}"
    return Line(what, f"≥ {goal}", _ratio(cell) + extra, cell["ratio"] >= goal)


def _never(what: str, cell: Mapping[str, Any]) -> Line:
    return Line(what, f"lower bound ≥ {NEVER_COSTS}", _ratio(cell), cell["low"] >= NEVER_COSTS)


def _ratio(cell: Mapping[str, Any]) -> str:
    return f"**{cell['ratio']:.2f}** [{cell['low']:.2f}, {cell['high']:.2f}]"


def render(setting: Mapping[str, Any], cells: Cells) -> str:
    """The table with what it was measured on."""
    machine = f"{setting['cpu']}, {setting['cpus']} cores, {', '.join(setting['features'])}"
    head = (
        f"Decode rate with drafts ÷ without, in turns on the same held-out prompts; {setting['pairs']} pairs a cell, "
        f"95 % intervals. {machine}; seed {setting['seed']}. `python -m benchmarks.speculation`\n\n"
        "| What | Goal | Measured | |\n|---|---|---|---|\n"
    )
    rows = (f"| {one.what} | {one.goal} | {one.found} | {'✓' if one.reached else 'missed'} |" for one in lines(cells))
    return head + "\n".join(rows) + "\n"


def publish(setting: Mapping[str, Any], cells: Cells) -> None:
    """Write the records, the page, and the part of README between its markers."""
    RESULTS.mkdir(exist_ok=True)
    text = render(setting, cells)
    day = datetime.date.today().isoformat()
    record = json.dumps({"setting": setting, "cells": cells}, indent=1)
    (RESULTS / f"speculation-{day}.json").write_text(record + "\n")
    (RESULTS / "speculation.md").write_text(text)
    readme = README.read_text()
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README has no {BEGIN} … {END}")
    README.write_text(f"{head}{BEGIN}\n{text}{END}{tail}")
