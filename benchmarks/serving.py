"""Whet beside vLLM on CPU, transformers serve and llama.cpp's server: same weights, prompts and requests, over HTTP.

    python -m benchmarks.serving [--only tiny-bf16,small-bf16] [--servers whet,engine,vllm] [--rounds 3]
                                 [--budget-minutes 40] [--publish]

For every model the servers take turns, in another order each round: start, first token, warm up, every shape at every
concurrency in a closed loop, memory, stop. `whet` is `whet up`: gateway, log, Postgres, engine process. `engine` is the
engine alone in one process, without HTTP. Output is greedy and of fixed length, no prompt is sent twice, nothing is
speculated. After that Poisson arrivals, once for each server. Every cell is on disk at once: the same command continues
a run that was cut. Peers are installed by `python -m benchmarks.peers`.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks import load, machine, peers, publish, shapes
from benchmarks.load import Target
from benchmarks.results import Record, Results
from benchmarks.servers import NAMES, Case, ServerFailed, clean_environment, prepare, serving

CASES = ("tiny-bf16", "small-bf16", "tiny-fp32", "small-fp32")
SHAPES = ("350/50", "120/25", "50/100")
CONCURRENCY = (1, 4, 16)
RATES = (1, 2, 5, 10, 20)
POISSON_SHAPE, POISSON_SECONDS, POISSON_LEAST = "120/25", 8.0, 12
# Above this many times the length of the arrivals the queue only grows, and quantiles say how long the run was.
OVERLOADED = 1.7
SEED = 0
MOST_WAVES = 60
# Shape, closed-loop concurrency, or arrivals a second; the one that does not apply is 0.
Cell = tuple[str, int, float]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Plan:
    """What to measure, and until when (monotonic seconds)."""

    shapes: tuple[str, ...]
    concurrency: tuple[int, ...]
    rates: tuple[int, ...]
    rounds: int
    cell_seconds: float
    idle_seconds: float
    until: float

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until


def main() -> None:
    """Measure what is missing, then write the table."""
    options = parse()
    clean_environment()
    # A run that is ended must end the server it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    until = time.monotonic() + 60 * options.budget_minutes
    plan = Plan(
        options.shapes, options.concurrency, options.rates, options.rounds, options.cell_seconds,
        options.idle_seconds, until,
    )  # fmt: skip
    results = Results(options.results)
    try:
        if not options.table_only:
            results.begin(setting(options))
            measure([make_case(options, name) for name in options.only], options.servers, plan, results)
    finally:
        publish.write(results, options.results.with_name("serving.md"), into_readme=options.publish)


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names_of(CASES), default=CASES[:2], help=f"of {','.join(CASES)}")
    parser.add_argument("--servers", type=names_of(NAMES), default=NAMES, help=f"of {','.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", type=names_of(SHAPES), default=SHAPES)
    parser.add_argument("--concurrency", type=numbers, default=CONCURRENCY)
    parser.add_argument("--rates", type=numbers, default=RATES, help="requests a second; 0 leaves Poisson arrivals out")
    parser.add_argument("--cell-seconds", type=float, default=2.0, help="least length of a measurement")
    parser.add_argument("--idle-seconds", type=float, default=60.0, help="wait at most this long for an idle machine")
    parser.add_argument("--budget-minutes", type=float, default=240.0, help="start nothing new after this long")
    parser.add_argument("--peers-dir", type=Path, default=peers.DEFAULT_DIRECTORY)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--results", type=Path, default=RESULTS / f"serving-{day}.json")
    parser.add_argument("--publish", action="store_true", help="put the table into README.md")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, write the table")
    return parser.parse_args()


def names_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names that must be known."""

    def names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return chosen

    return names


def numbers(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers; zeros are dropped."""
    return tuple(number for number in map(int, text.split(",")) if number)


def setting(options: argparse.Namespace) -> Record:
    """What a reader needs to repeat the run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    words = [
        f"--{name.replace('_', '-')}={given(value)}" for name, value in vars(options).items() if name not in PLACES
    ]
    installed = [name for name in options.servers if name not in ("whet", "engine")]
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.serving", *words]),
        "commit": commit.stdout.strip(),
        "machine": machine.facts(),
        "versions": {name: peers.version(options.peers_dir, name) for name in installed},
    }


PLACES = ("peers_dir", "results", "publish", "table_only")


def given(value: object) -> str:
    """An option as it would be typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_case(options: argparse.Namespace, name: str) -> Case:
    """Write the model unless it is there; in a process of its own, because this one stays small."""
    models = options.peers_dir.absolute() / "models"
    subprocess.run([sys.executable, "-m", "benchmarks.random_models", str(models), name], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return Case(name, models / name, options.peers_dir.absolute())


def measure(cases: Sequence[Case], servers: tuple[str, ...], plan: Plan, results: Results) -> None:
    """The closed loops of every model, then Poisson arrivals. A server that fails is recorded, and the run goes on."""
    for case in cases:
        measure_loops(case, servers, plan, results)
    for case in cases:
        measure_arrivals(case, servers, plan, results)


def measure_loops(case: Case, servers: tuple[str, ...], plan: Plan, results: Results) -> None:
    """All rounds of one model, the servers in another order each."""
    for turn in range(plan.rounds):
        for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
            done = results.having("cell", case.name, server, turn)
            cells = [(s, c, 0.0) for s in plan.shapes for c in plan.concurrency if (s, c) not in done]
            attempt(Block(case, server, turn, plan, results), cells)


def measure_arrivals(case: Case, servers: tuple[str, ...], plan: Plan, results: Results) -> None:
    """Poisson arrivals at every rate, once for each server."""
    for server in (name for name in servers if name != "engine"):
        rates = [q for q in plan.rates if not results.has(kind="poisson", case=case.name, server=server, qps=q)]
        attempt(Block(case, server, None, plan, results), [(POISSON_SHAPE, 0, float(rate)) for rate in rates])


def attempt(block: "Block", cells: Sequence[Cell]) -> None:
    """Run what is missing of one server's block, while there is time; record its failure, if it fails."""
    if not cells or block.plan.over:
        return
    try:
        block.run(cells)
    except Exception as error:
        # Hours of other measurements must not end with one server, whatever it did.
        said = f"{type(error).__name__}: {error}".replace(str(block.case.peers), "PEERS")
        block.keep("failure", error=said[:2000])


@dataclass(frozen=True)
class Block:
    """One server on one model, from its start to its stop; `turn` is None for Poisson arrivals."""

    case: Case
    server: str
    turn: int | None
    plan: Plan
    results: Results

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure the cells that are missing."""
        idle = machine.wait_idle(self.plan.idle_seconds)
        if self.server == "engine":
            self.run_engine(idle)
            return
        prepare(self.server, self.case)
        words = json.loads((self.case.directory / "words.json").read_text())
        began = time.perf_counter()
        with serving(self.server, self.case) as target:
            self.first_token(target, words, began, idle)
            for shape, concurrency, rate in cells:
                if self.plan.over:
                    return
                if rate:
                    self.poisson(target, words, shape, rate)
                else:
                    self.closed(target, words, shape, concurrency)
            if self.turn is not None:
                self.keep("memory", **machine.memory(psutil.Process()))

    def first_token(self, target: Target, words: list[str], began: float, idle: Record) -> None:
        """How long the start took, then enough work for whatever compiles or grows on first use."""
        answers = load.run(load.closed_loop(target, shapes.make_prompts(words, 16, 1, "first"), 1, 1)).answers
        if answers[0].error:
            raise ServerFailed(answers[0].error)
        seconds = answers[0].arrivals[0] - began
        if self.turn is not None:
            self.keep("start", first_token_seconds=round(seconds, 2), **idle)
        for concurrency in (1, 16):
            prompts = shapes.make_prompts(words, 60, concurrency, f"warm {concurrency}")
            load.run(load.closed_loop(target, prompts, 12, concurrency))

    def closed(self, target: Target, words: list[str], shape: str, concurrency: int) -> None:
        """One wave of requests says how many fill the time. A wave that fills it alone is the measurement."""
        length, tokens = shapes.parse_shape(shape)
        seed = f"{self.case.name} {self.turn} {shape} {concurrency}"
        prompts = shapes.make_prompts(words, length, concurrency * (1 + MOST_WAVES), seed)
        measured = load.run(load.closed_loop(target, prompts[:concurrency], tokens, concurrency))
        if measured.seconds < self.plan.cell_seconds:
            waves = shapes.waves_to_fill(self.plan.cell_seconds, measured.seconds, most=MOST_WAVES)
            chosen = prompts[concurrency : (1 + waves) * concurrency]
            measured = load.run(load.closed_loop(target, chosen, tokens, concurrency))
        self.keep("cell", shape=shape, concurrency=concurrency, seed=seed, **load.summary(measured))

    def poisson(self, target: Target, words: list[str], shape: str, rate: float) -> None:
        """Arrivals at one rate, the same moments and prompts for every server."""
        if self.results.has_overload(self.case.name, self.server, rate):
            self.keep("poisson", shape=shape, qps=rate, overloaded=True)
            return
        length, tokens = shapes.parse_shape(shape)
        seed = f"{self.case.name} {rate}"
        prompts = shapes.make_prompts(words, length, max(POISSON_LEAST, round(rate * POISSON_SECONDS)), seed)
        measured = load.run(load.poisson(target, prompts, tokens, rate, SEED))
        overloaded = measured.seconds > OVERLOADED * len(prompts) / rate
        self.keep("poisson", shape=shape, qps=rate, seed=seed, overloaded=overloaded, **load.summary(measured))

    def run_engine(self, idle: Record) -> None:
        """The same cells without HTTP, in a process of their own."""
        command = [
            sys.executable, "-m", "benchmarks.engine_alone", "--model", str(self.case.directory),
            "--precision", self.case.precision, "--shapes", ",".join(self.plan.shapes),
            "--concurrency", ",".join(map(str, self.plan.concurrency)), "--seconds", str(self.plan.cell_seconds),
            "--seed", f"{self.case.name} {self.turn}",
        ]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                self.keep("cell", **json.loads(line), **idle)
        if child.returncode != 0:
            raise RuntimeError(f"the engine alone ended with {child.returncode}")

    def keep(self, kind: str, **figures: object) -> None:
        """Write one record, and say so."""
        record = {"kind": kind, "case": self.case.name, "server": self.server, "round": self.turn, **figures}
        self.results.add(record)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
