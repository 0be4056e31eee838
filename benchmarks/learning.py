"""What learning is held to, measured: simulations of the gate and the canary, faults injected, whole runs.

    python -m benchmarks.learning [--only gate.looks,canary …] [--scale 0.1] [--publish]

Cells come from every module `benchmarks/learning_*.py` that has `CELLS`; `--only` takes names of modules (`gate`) and
of cells (`gate.looks`). What was measured before is kept, each cell with its commit. `--publish` writes the table into
README.
"""

import importlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import publish as pages
from benchmarks.learning_cells import Cell

BEGIN, END = "<!-- learning:begin -->", "<!-- learning:end -->"
RESULTS = Path(__file__).parent / "results" / "learning.json"
PREFIX = "learning_"
PUBLISHED = 1.0
Measure = Callable[[float], Cell]


def cells() -> dict[str, Measure]:
    """Every cell by `module.cell`, the module without its prefix."""
    found: dict[str, Measure] = {}
    for module in sorted(Path(__file__).parent.glob(f"{PREFIX}*.py")):
        offered: Mapping[str, Measure] = getattr(importlib.import_module(f"benchmarks.{module.stem}"), "CELLS", {})
        found |= {f"{module.stem.removeprefix(PREFIX)}.{name}": measure for name, measure in offered.items()}
    return found


def chosen(known: Mapping[str, Measure], only: str) -> dict[str, Measure]:
    """Those named, by module or by cell. Raises ValueError for a name that there is not."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    picked = {
        name: measure
        for name, measure in known.items()
        if not names or name in names or name.partition(".")[0] in names
    }
    matched = {part for name in picked for part in (name, name.partition(".")[0])}
    unknown = [name for name in names if name not in matched]
    if unknown:
        raise ValueError(f"no cell {', '.join(unknown)}: {', '.join(known)}")
    return picked


def stored() -> dict[str, dict[str, Any]]:
    """What was measured before."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def record(cell: Cell, *, scale: float, seconds: float) -> dict[str, Any]:
    """A cell with what it was measured by."""
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return {
        **cell._asdict(), "scale": scale, "seconds": round(seconds, 1), "commit": commit,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def render(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, in the order in which cells are found, and how it was made."""
    order = [name for name in cells() if name in measured]
    rows = [["", "Goal", "Measured", ""]]
    for name in order:
        one = measured[name]
        told = one["measured"] + ("" if one["scale"] == PUBLISHED else f" (at {one['scale']:g} of the size)")
        rows.append([one["what"], one["goal"], told, "" if one["met"] else "✗"])
    commits = ", ".join(pages.unique(str(measured[name]["commit"]) for name in order))
    head = f"`python -m benchmarks.learning`, commit {commits}; shares with 95 % intervals (Clopper–Pearson).\n\n"
    return head + pages.table(rows) + "\n"


def main(
    only: Annotated[str, typer.Option(help="Modules or cells, by commas; all without it.")] = "",
    scale: Annotated[float, typer.Option(min=0.001, help="Share of the repetitions that are published.")] = PUBLISHED,
    publish: Annotated[bool, typer.Option(help="Write the table into README.")] = False,
    keep: Annotated[bool, typer.Option(help="Store what is measured.")] = True,
) -> None:
    """Measure, store, show."""
    measured = stored()
    for name, measure in chosen(cells(), only).items():
        began = time.monotonic()
        cell = measure(scale)
        if keep:  # another run may have stored its own meanwhile
            measured = stored()
        measured[name] = record(cell, scale=scale, seconds=time.monotonic() - began)
        print(f"{'met ' if cell.met else 'MISSED'} {name}: {cell.measured}  (goal: {cell.goal})", flush=True)
        if keep:
            RESULTS.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n")
    if publish:
        text = render(measured)
        pages.README.write_text(pages.between_markers(pages.README.read_text(), text, BEGIN, END))
        print(f"README has the table of {shlex.join(sys.argv)}")


if __name__ == "__main__":
    # A run that is ended must end the platform it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    typer.run(main)
