"""What drafting earns on the starter's applications, trained only on logged traffic; all ratios from one run.

    python -m benchmarks.speculation [--work DIR] [--only NAMES] [--pairs 30] [--requests 5000] [--quick] [--publish]

Decode rate is tokens after the first message over the time from there to the last, with messages encoded as the
engine's process would; drafted and plain take turns on the same held-out prompts and seeds. `--work` keeps traffic,
heads and the cells measured so far: a run that was cut goes on where it stopped, one that lost a cell tries it again.
`--quick` is a few minutes' smoke that proves nothing. On a machine with CUDA the engine runs there.
"""

import argparse
import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks import machine, speculation_cells, speculation_load, speculation_table
from benchmarks.figures import show
from benchmarks.speculation_cells import Bench, Cell, Scale
from benchmarks.speculation_traffic import keep
from engine.process import KEEP_BYTES, tune_heap

WORK = Path.home() / ".cache" / "whet" / "speculation"
# The cadence's first training.
FIRST_TOKENS = 50_000
QUICK = {"requests": 48, "pairs": 4, "first_tokens": 1000, "swaps": 10}


class Kept:
    """Cells in a file, on disk as soon as they are measured."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.cells: dict[str, Cell] = json.loads(file.read_text()) if file.exists() else {}

    def measure(self, name: str, action: Callable[[], Cell], commit: str) -> None:
        """Measure what is not there yet. A cell that fails is told, and the run goes on."""
        if name in self.cells:
            return
        idle = machine.wait_idle(1.0)
        began = time.perf_counter()
        try:
            cell = action()
        except Exception as error:
            # Half an hour of other cells must not end with one.
            traceback.print_exc()
            show(cell=name, failed=f"{type(error).__name__}: {error}")
            return
        took = round(time.perf_counter() - began, 1)
        self.cells[name] = cell | {"took": took, "commit": commit + ("-changed" if changed() else ""), **idle}
        keep(self.file, self.cells)
        show(cell=name, **{key: round(value, 3) if isinstance(value, float) else value for key, value in cell.items()})


def main() -> None:
    """Prepare, measure what is missing, print, and write the page."""
    options = parse()
    tune_heap(KEEP_BYTES)
    options.work.mkdir(parents=True, exist_ok=True)
    scale = Scale(options.requests, options.pairs, options.seed, options.first_tokens, options.swaps)
    name = f"cells-{scale.requests}-{scale.pairs}-{scale.seed}.json"
    kept = Kept(options.work / name)
    if not options.table_only:
        bench = Bench(options.work, scale)
        setting = setting_of(options, bench)
        keep(options.work / f"setting-{name}", setting)
        wanted = [part for part in options.only.split(",") if part]
        for cell, action in (speculation_cells.cells(bench) | speculation_load.cells(bench)).items():
            if not wanted or any(part in cell for part in wanted):
                kept.measure(cell, action, setting["commit"])
        bench.close()
    setting = json.loads((options.work / f"setting-{name}").read_text())
    print(speculation_table.render(setting, kept.cells))
    if options.publish:
        speculation_table.publish(setting, kept.cells)


def changed() -> bool:
    """Whether the tree differs from its commit: such a cell may have measured something else."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", "engine", "worker", "benchmarks"]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--only", default="", help="measure cells whose name contains one of these, comma-separated")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="little of everything; nothing to publish")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, show what is there")
    parser.add_argument("--publish", action="store_true", help="also write benchmarks/results and the table in README")
    parser.set_defaults(first_tokens=FIRST_TOKENS)
    options = parser.parse_args()
    if options.quick and options.publish:
        parser.error("--quick measures too little to be published")
    if options.quick:
        vars(options).update(QUICK)
    return options


def setting_of(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What a reader needs to repeat the run and to judge it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    status = bench.world.core.status("")
    words = f"--pairs={options.pairs} --requests={options.requests} --seed={options.seed}"
    return machine.facts() | {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip(),
        "command": f"python -m benchmarks.speculation {words}", "pairs": options.pairs, "requests": options.requests,
        "singles": bench.scale.singles(), "seed": options.seed, "dtype": status.dtype, "device": status.device,
        "kernels": status.kernels,
        "tokens": {name: sum(len(row.answer) for row in rows) for name, rows in bench.logged.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
