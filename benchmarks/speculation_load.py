"""The cells of benchmarks/speculation.py about serving: mixed batches, swaps under load, memory."""

import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.adapters import write_adapter
from benchmarks.figures import STARTER
from benchmarks.speculation_cells import APPLICATIONS, Bench, Cell
from benchmarks.speculation_world import Ask, Rate, Told, World, interval, total
from benchmarks.suffix import resident_mb
from engine.messages import LoadSpeculator

# Requests of each project in a mixed batch, and how often they are repeated so that the batch is full for a while.
EACH, REPEATS, RANK = 4, 3, 8
SWAP_STREAMS, SWAP_REQUESTS, SWAP_STEPS = 8, 96, 12
CORPUS_TOKENS, ANSWER = 1 << 20, 64


def cells(bench: Bench) -> dict[str, Callable[[], Cell]]:
    """The cells of this file by name."""
    return {
        "mixed batch": partial(mixed, bench),
        "swaps": partial(swaps, bench, bench.scale.swaps),
        "memory": partial(memory, bench.world),
    }


def mixed(bench: Bench) -> Cell:
    """Three projects with an adapter and heads of their own in one batch, over each served alone; tokens a second."""
    asks: dict[str, list[Ask]] = {}
    for number, name in enumerate(APPLICATIONS):
        adapter = _adapter(bench, number)
        heads = renamed(bench.work, bench.heads[name, bench.scale.requests].digest, {"adapter": adapter})
        bench.world.load(heads)
        found = bench.asks(name, bench.scale.requests, EACH * bench.scale.pairs)
        asks[name] = [ask._replace(adapter=adapter, speculator=heads) for ask in found]
        bench.world.run(asks[name][:EACH], EACH)
    pairs = []
    for number in range(bench.scale.pairs):
        parts = [asks[name][number * EACH : (number + 1) * EACH] * REPEATS for name in APPLICATIONS]
        together = [ask for trio in zip(*parts, strict=True) for ask in trio]
        pairs.append(_in_turns(bench.world, together, parts, first=number % 2 == 0))
    ratio, low, high = interval(pairs)
    return {"ratio": ratio, "low": low, "high": high, "pairs": len(pairs)}


def _in_turns(world: World, together: list[Ask], parts: list[list[Ask]], *, first: bool) -> tuple[Rate, Rate]:
    """One batch of all, and one project after the other at the same number of streams."""
    streams = EACH * REPEATS
    if first:
        whole = _timed(world, together, streams)
        return whole, total([_timed(world, part, streams) for part in parts])
    alone = total([_timed(world, part, streams) for part in parts])
    return _timed(world, together, streams), alone


def _timed(world: World, asks: list[Ask], concurrency: int) -> Rate:
    began = time.perf_counter()
    told = world.run(asks, concurrency)
    return sum(len(one.tokens) for one in told), time.perf_counter() - began


def _adapter(bench: Bench, number: int) -> str:
    """A random adapter, loaded; made once for a work directory."""
    directory = bench.work / f"adapter-{number}"
    if not (directory / "manifest.json").exists():
        for file in directory.glob("*"):
            file.unlink()
        if directory.exists():
            directory.rmdir()
        write_adapter(bench.work, STARTER, RANK, number)
    digest = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    bench.world.load_adapter(digest, directory.name)
    return digest


class Swapper:
    """Replaces heads by each other, again and again, while streams run; one load at a time."""

    def __init__(self, world: World, first: str, second: str) -> None:
        self.world, self.now, self.other = world, first, second
        self.failed = 0
        # When each swap had happened.
        self.moments: list[float] = []

    def steps(self) -> Iterator[None]:
        """Advance once a step: orders the next swap some steps after the one before was answered."""
        while True:
            for _ in range(SWAP_STEPS):
                yield
            known = len(self.world.answers)
            self.world.core.load_speculator(
                b"benchmark", LoadSpeculator(id="swap", digest=self.other, path=self.other, replaces=self.now)
            )
            while len(self.world.answers) == known:
                yield
            answer = self.world.answers[-1]
            if answer.error or answer.serving != self.other:
                self.failed += 1
            else:
                self.now, self.other = self.other, self.now
            self.moments.append(time.perf_counter())


def swaps(bench: Bench, wanted: int) -> Cell:
    """Tokens against a run without drafts, pauses against a run without swaps in the same minutes; fp32, which promises
    the same tokens."""
    world = World(STARTER, bench.work, precision="fp32")
    first = bench.heads["chat", bench.scale.requests].digest
    asks = bench.asks("chat", bench.scale.requests, SWAP_REQUESTS, world=world)
    right = [one.tokens for one in world.run([ask._replace(speculate=False) for ask in asks], SWAP_STREAMS)]
    swapper = Swapper(world, first, renamed(bench.work, first, {"run": "twin"}))
    gaps: dict[bool, list[float]] = {True: [], False: []}
    failed = wrong = 0
    steps = swapper.steps()
    while len(swapper.moments) < wanted:
        for swapping in (False, True):
            told = world.run(asks, SWAP_STREAMS, steps if swapping else None, strict=False)
            failed += sum(bool(one.failure) for one in told)
            wrong += sum(one.tokens != tokens for one, tokens in zip(told, right, strict=True) if not one.failure)
            gaps[swapping] += [one.longest_gap for one in told if not swapping or _overlaps(one, swapper.moments)]
    world.close()
    p99 = {swapping: 1000 * statistics.quantiles(found, n=100)[98] for swapping, found in gaps.items()}
    return {
        "swaps": len(swapper.moments), "refused": swapper.failed, "failed": failed, "wrong": wrong,
        "streams": len(gaps[True]), "added_ms": p99[True] - p99[False], "control_ms": p99[False],
    }  # fmt: skip


def _overlaps(one: Told, moments: list[float]) -> bool:
    return bool(one.times) and any(one.began <= moment <= one.times[-1] for moment in moments)


def memory(world: World) -> Cell:
    """One project's corpus with a million tokens, and after a million more; random tokens, the worst there can be."""
    corpora, before = world.core.drafting.corpora, resident_mb()
    counted, resident = [], []
    for turn in range(2):
        for number in range(CORPUS_TOKENS // ANSWER):
            draw = random.Random(f"{turn} {number}")
            corpora.learn("full", [draw.randrange(4096) for _ in range(ANSWER)])
        counted += [one.bytes / 1e6 for one in corpora.status() if one.namespace == "full"]
        resident.append(resident_mb() - before)
    world.core.drafting.forget("full")
    return {"megabytes": counted[0], "later": counted[1], "resident": resident[0], "resident_later": resident[1]}


def renamed(work: Path, digest: str, changed: dict[str, str]) -> str:
    """The same heads under another name, with another manifest; its digest."""
    manifest = json.loads((work / digest / "manifest.json").read_bytes())
    raw = json.dumps(manifest | changed, sort_keys=True).encode()
    named = hashlib.sha256(raw).hexdigest()
    target = work / named
    if not (target / "manifest.json").exists():
        target.mkdir(exist_ok=True)
        for file in manifest["files"]:
            if not (target / file).exists():
                (target / file).hardlink_to(work / digest / file)
        (target / "manifest.json").write_bytes(raw)
    return named
