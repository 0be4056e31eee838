"""What drafting earns on the starter's applications, trained only on logged traffic; all ratios from one run.

    python -m benchmarks.speculation [--work DIR] [--only NAMES] [--pairs 30] [--requests 5000] [--publish]

`--work` keeps traffic, heads and the cells measured so far: a run that was cut goes on where it stopped.
Decode rate is tokens after the first message over the time they took, policy and plain in turns on the same prompts.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks import machine, speculation_table
from benchmarks.adapters import write_adapter
from benchmarks.figures import STARTER, random_prompts, show
from benchmarks.random_models import ensure_model
from benchmarks.speculation_fixed import arms
from benchmarks.speculation_world import (
    TEMPERATURE,
    Ask,
    Told,
    Trained,
    World,
    interval,
    prompts,
    traffic,
    trained,
)  # fmt: skip
from engine.messages import LoadAdapter
from engine.process import KEEP_BYTES, tune_heap
from engine.speculation.policy import Adaptive

APPLICATIONS = ("match", "entities", "chat")
LEARNT = (50, 500, 5000)
# The cadence's first training: before that a project has the suffix drafter alone.
FIRST_TOKENS = 50_000
WARM = 24
Cell = dict[str, Any]


class Bench:
    """Everything prepared, and one method per kind of cell; each returns figures as JSON can hold them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.pairs: int = options.pairs
        self.seed: int = options.seed
        self.requests: int = options.requests
        self.logged = {name: traffic(self.work, name, self.requests, self.seed) for name in APPLICATIONS}
        self.heads: dict[tuple[str, int], Trained] = {}
        for name in APPLICATIONS:
            for learnt in self.sizes:
                rows = self.logged[name][:learnt]
                if sum(len(row.answer) for row in rows) >= FIRST_TOKENS:
                    self.heads[name, learnt] = trained(self.work, name, rows, self.seed)
        self.held = {name: prompts(name, "held_out", 400, self.seed + 1) for name in APPLICATIONS}
        self.world = World(STARTER, self.work, kv_tokens=65536)
        self._taught: set[str] = set()

    @property
    def sizes(self) -> list[int]:
        """How many logged requests the cells have behind them."""
        return [size for size in LEARNT if size < self.requests] + [self.requests]

    def asks(self, name: str, learnt: int, number: int, *, temperature: float = 0.0, start: int = 0) -> list[Ask]:
        """Held-out requests of a project that has served so many; its corpus, heads and counts are made ready."""
        namespace = f"{name} {learnt}"
        heads = self.heads.get((name, learnt))
        digest = heads.digest if heads else None
        if namespace not in self._taught:
            self._taught.add(namespace)
            self.world.learn(namespace, self.logged[name][:learnt])
            if digest:
                self.world.load(digest)
            warm = prompts(name, "train", self.requests + WARM, self.seed)[-WARM:]
            self.world.run([Ask(prompt, namespace, 0.0, 0, digest) for prompt in warm], 1)
        chosen = self.held[name][start : start + number]
        return [Ask(prompt, namespace, temperature, start + at, digest) for at, prompt in enumerate(chosen)]

    def single(self, name: str, learnt: int, temperature: float) -> Cell:
        """One stream: each prompt plain and drafted, in turns."""
        asks = self.asks(name, learnt, self.pairs, temperature=temperature)
        return self._compare([[ask] for ask in asks], 1)

    def crowd(self, concurrency: int) -> Cell:
        """Streams of the three applications at once, in blocks of at least as many requests."""
        learnt = self.requests
        size = max(concurrency, min(3 * concurrency, 48))
        blocks = []
        for number in range(self.pairs):
            mixed = [
                ask for name in APPLICATIONS for ask in self.asks(name, learnt, -(-size // 3), start=number * 7 % 200)
            ]
            random.Random(number).shuffle(mixed)
            blocks.append(mixed)
        return self._compare(blocks, concurrency)

    def unpredictable(self, concurrency: int) -> Cell:
        """Random weights at temperature 1: nothing can be foreseen, and drafting must not cost."""
        model = ensure_model(self.work, "tiny-fp32")
        world = World(model, self.work)
        texts = random_prompts(model, self.pairs * concurrency, 60, self.seed)
        asks = [Ask(text, "noise", 1.0, at, most=100) for at, text in enumerate(texts)]
        world.run(asks[:4], 1)
        blocks = [asks[at * concurrency : (at + 1) * concurrency] for at in range(self.pairs)]
        cell = self._compare(blocks, concurrency, world)
        world.close()
        return cell

    def hindsight(self, name: str, concurrency: int) -> Cell:
        """The policy against every fixed (drafter, length), also in turns; the best of them is chosen afterwards."""
        chosen = [name] if name != "mixed" else list(APPLICATIONS)
        size = 1 if concurrency == 1 else max(8, concurrency)
        each = -(-size // len(chosen))
        policy, totals = Adaptive(), {}
        rates: dict[str, list[tuple[float, float]]] = {}
        for number in range(self.pairs):
            asks = [a for one in chosen for a in self.asks(one, self.requests, each, start=number * each % 200)]
            turn = list(arms().items())
            random.Random(number).shuffle(turn)
            for arm, fixed in [*turn, ("policy", None)] if number % 2 else [("policy", None), *turn]:
                self.world.core.drafting.policy = fixed or policy
                rates.setdefault(arm, []).append(_sum(self.world.run(asks, concurrency)))
        self.world.core.drafting.policy = policy
        totals = {arm: sum(t for t, _ in pairs) / sum(s for _, s in pairs) for arm, pairs in rates.items()}
        best = max((arm for arm in totals if arm != "policy"), key=totals.__getitem__)
        ratio, low, high = interval(list(zip(rates["policy"], rates[best], strict=True)))
        return {"ratio": ratio, "low": low, "high": high, "best": best, "rates": totals, "pairs": self.pairs}

    def mixed(self) -> Cell:
        """Three projects with an adapter and heads of their own in one batch, over each served alone."""
        asks: dict[str, list[Ask]] = {}
        for number, name in enumerate(APPLICATIONS):
            adapter = self._adapter(number)
            heads = self._heads_of(self.heads[name, self.requests].digest, adapter)
            self.world.load(heads)
            asks[name] = [
                ask._replace(adapter=adapter, speculator=heads)
                for ask in self.asks(name, self.requests, 4 * self.pairs)
            ]
        pairs = []
        for at in range(self.pairs):
            parts = [asks[name][at * 4 : at * 4 + 4] * 3 for name in APPLICATIONS]
            together = self._timed([ask for trio in zip(*parts, strict=True) for ask in trio], 12)
            alone = [self._timed(part, 12) for part in parts]
            pairs.append((together, (sum(t for t, _ in alone), sum(s for _, s in alone))))
        ratio, low, high = interval(pairs)
        return {"ratio": ratio, "low": low, "high": high, "pairs": self.pairs}

    def swaps(self, swaps: int = 200, every: int = 12) -> Cell:
        """Heads replaced again and again under eight streams: tokens against a run without drafts, pauses against a
        run without swaps."""
        name = "chat"
        first = self.heads[name, self.requests].digest
        second = self._heads_of(first, None, name="twin")
        asks = self.asks(name, self.requests, 200)
        wanted = [one.tokens for one in self.world.run([ask._replace(speculate=False) for ask in asks], 8)]
        wrong = done = 0
        gaps: dict[bool, list[float]] = {True: [], False: []}
        now = first

        def swapping() -> Iterator[object]:
            nonlocal done, now
            while True:
                for _ in range(every):
                    yield None
                other = second if now == first else first
                self.world.core.load_speculator(b"swap", _load(other, now))
                now, done = other, done + 1

        while done < swaps:
            for swap in (False, True):
                told = self.world.run(asks, 8, swapping() if swap else None)
                wrong += sum(one.tokens != right for one, right in zip(told, wanted, strict=True))
                gaps[swap] += [one.longest_gap for one in told]
        while self.world.core.drafting.restless or self.world.core.busy:
            self.world.core.step()
        self.world.core.outbox.clear()
        p99 = {swap: statistics.quantiles(found, n=100)[98] * 1000 for swap, found in gaps.items()}
        return {
            "swaps": done,
            "failed": 0,
            "wrong": wrong,
            "added_ms": p99[True] - p99[False],
            "control_ms": p99[False],
        }

    def memory(self) -> Cell:
        """One project's corpus with a million tokens, and after a million more."""
        sizes = []
        for turn in range(2):
            for number in range(1 << 14):
                draw = random.Random(f"{turn} {number}")
                self.world.core.drafting.corpora.learn("full", [draw.randrange(4096) for _ in range(64)])
            sizes += [one.bytes / 1e6 for one in self.world.core.drafting.corpora.status() if one.namespace == "full"]
        self.world.core.drafting.forget("full")
        return {"megabytes": sizes[0], "later": sizes[1]}

    def training(self) -> Cell:
        """From the logged requests to heads in a slot, by application."""
        seconds = {name: self.heads[name, self.requests].seconds for name in APPLICATIONS}
        taus = {name: self.heads[name, self.requests].tau for name in APPLICATIONS}
        return {"seconds": seconds, "tau": taus}

    def _compare(self, blocks: Sequence[Sequence[Ask]], concurrency: int, world: World | None = None) -> Cell:
        """Plain and drafted, in turns, on each block; decode rates and tokens a second from end to end."""
        world = world or self.world
        pairs, whole, said, drafted, accepted, steps = [], [], 0, 0, 0, 0
        for number, block in enumerate(blocks):
            sides: dict[bool, tuple[float, float]] = {}
            ends: dict[bool, tuple[float, float]] = {}
            for speculate in (True, False) if number % 2 else (False, True):
                began = time.perf_counter()
                told = world.run([ask._replace(speculate=speculate) for ask in block], concurrency)
                ends[speculate] = sum(len(one.tokens) for one in told), time.perf_counter() - began
                sides[speculate] = _sum(told)
                if speculate:
                    said += sum(len(one.tokens) for one in told)
                    steps += sum(len(one.times) for one in told)
                    drafted += sum(one.drafted for one in told)
                    accepted += sum(one.accepted for one in told)
            if all(seconds for _, seconds in sides.values()):
                pairs.append((sides[True], sides[False]))
                whole.append((ends[True], ends[False]))
        ratio, low, high = interval(pairs)
        plain = sum(t for _, (t, _) in pairs) / sum(s for _, (_, s) in pairs)
        return {
            "ratio": ratio, "low": low, "high": high, "pairs": len(pairs), "plain": plain,
            "end_to_end": interval(whole)[0], "tokens_per_step": said / steps, "drafted": drafted, "accepted": accepted,
        }  # fmt: skip

    def _timed(self, asks: list[Ask], concurrency: int) -> tuple[float, float]:
        began = time.perf_counter()
        told = self.world.run(asks, concurrency)
        return sum(len(one.tokens) for one in told), time.perf_counter() - began

    def _adapter(self, number: int) -> str:
        directory = write_adapter(self.work, STARTER, 8, number)
        digest = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
        self.world.core.load_adapter(b"load", LoadAdapter(id="a", digest=digest, path=directory.name))
        while not self.world.core.adapters.slots.ready(digest):
            self.world.core.step()
            time.sleep(0.001)
        self.world.core.outbox.clear()
        return digest

    def _heads_of(self, digest: str, adapter: str | None, name: str = "") -> str:
        """The same heads under another name: for an adapter's states, or as a second of two that are swapped."""
        manifest = json.loads((self.work / digest / "manifest.json").read_bytes())
        raw = json.dumps(manifest | {"adapter": adapter, "run": name}, sort_keys=True).encode()
        named = hashlib.sha256(raw).hexdigest()
        target = self.work / named
        if not target.exists():
            target.mkdir()
            for file in manifest["files"]:
                (target / file).hardlink_to(self.work / digest / file)
            (target / "manifest.json").write_bytes(raw)
        return named


def _sum(told: Sequence[Told]) -> tuple[float, float]:
    """Tokens and seconds of decoding, over the streams."""
    rates = [one.decode for one in told]
    return sum(tokens for tokens, _ in rates), sum(seconds for _, seconds in rates)


def _load(digest: str, replaces: str) -> Any:  # noqa: ANN401 - a message of the engine's
    from engine.messages import LoadSpeculator

    return LoadSpeculator(id=digest[:8], digest=digest, path=digest, replaces=replaces)


def cells(bench: Bench) -> dict[str, Callable[[], Cell]]:
    """Every cell by its name, in the order they are measured."""
    found: dict[str, Callable[[], Cell]] = {}
    for name in APPLICATIONS:
        for learnt in bench.sizes:
            found[f"single {name} greedy after {learnt}"] = partial(bench.single, name, learnt, 0.0)
        found[f"single {name} at {TEMPERATURE} after {bench.requests}"] = partial(
            bench.single, name, bench.requests, TEMPERATURE
        )
    found |= {f"crowd {concurrency}": partial(bench.crowd, concurrency) for concurrency in (4, 16, 64)}
    found |= {f"unpredictable {concurrency}": partial(bench.unpredictable, concurrency) for concurrency in (1, 16)}
    found |= {f"hindsight {name} 1": partial(bench.hindsight, name, 1) for name in APPLICATIONS}
    found |= {
        f"hindsight mixed {concurrency}": partial(bench.hindsight, "mixed", concurrency) for concurrency in (4, 16)
    }
    found |= {"mixed batch": bench.mixed, "swaps": bench.swaps, "memory": bench.memory, "training": bench.training}
    return found


def main() -> None:
    """Prepare, measure what is missing, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "whet" / "speculation")
    parser.add_argument("--only", default="", help="measure cells whose name contains one of these, comma-separated")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--publish", action="store_true", help="also write benchmarks/results and the table in README")
    options = parser.parse_args()
    tune_heap(KEEP_BYTES)
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / f"cells-{options.requests}-{options.pairs}-{options.seed}.json"
    found: dict[str, Cell] = json.loads(kept.read_text()) if kept.exists() else {}
    setting = machine.facts() | {"pairs": options.pairs, "requests": options.requests, "seed": options.seed}
    bench = Bench(options)
    wanted = [part for part in options.only.split(",") if part]
    for name, measure in cells(bench).items():
        if name in found or (wanted and not any(part in name for part in wanted)):
            continue
        began = time.perf_counter()
        found[name] = measure() | {"took": round(time.perf_counter() - began, 1), "load": os.getloadavg()[0]}
        show(cell=name, **{key: round(v, 3) if isinstance(v, float) else v for key, v in found[name].items()})
        kept.write_text(json.dumps(found))
    bench.world.close()
    print(speculation_table.render(setting, found))
    if options.publish:
        speculation_table.publish(setting, found)


if __name__ == "__main__":
    main()
