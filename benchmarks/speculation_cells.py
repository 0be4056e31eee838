"""The cells of benchmarks/speculation.py that compare rates: drafted and plain, policy and fixed choices, in turns."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.figures import STARTER, random_prompts, timed
from benchmarks.random_models import ensure_model
from benchmarks.speculation_fixed import Fixed, arms
from benchmarks.speculation_traffic import TEMPERATURE, Trained, prompts, report_file, traffic, trained
from benchmarks.speculation_world import Ask, Rate, World, decoding, interval, total
from engine.messages import UnloadSpeculator
from engine.speculation.policy import Adaptive, Policy
from worker.gate.speculator_job import judge_report

APPLICATIONS = ("match", "entities", "chat")
LEARNT = (50, 500, 5000)
HELD_OUT, WARM = 400, 24
NOISE_TOKENS, NOISE_PROMPT = 100, 60
Cell = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured. `first_tokens`: the cadence's first training; before it a project has no heads.

    `pairs` is for blocks of many requests. Single streams are short: of them there are four times as many.
    """

    requests: int
    pairs: int
    seed: int
    first_tokens: int
    swaps: int

    @property
    def sizes(self) -> list[int]:
        """How many logged requests the cells have behind them."""
        return [size for size in LEARNT if size < self.requests] + [self.requests]

    def singles(self, times: int = 4) -> int:
        """Pairs of single streams."""
        return min(HELD_OUT, times * self.pairs)


class Bench:
    """Everything prepared, and one method per kind of cell; each returns figures as JSON can hold them."""

    def __init__(self, work: Path, scale: Scale) -> None:
        self.work, self.scale = work, scale
        self.logged = {name: traffic(work, name, scale.requests, scale.seed) for name in APPLICATIONS}
        self.heads: dict[tuple[str, int], Trained] = {}
        for name in APPLICATIONS:
            for learnt in scale.sizes:
                rows = self.logged[name][:learnt]
                if sum(len(row.answer) for row in rows) >= scale.first_tokens:
                    self.heads[name, learnt] = trained(work, name, rows, scale.seed)
        self.held = {name: prompts(name, "held_out", HELD_OUT, scale.seed + 1) for name in APPLICATIONS}
        self.world = World(STARTER, work, kv_tokens=65536)
        self._taught: set[tuple[World, str]] = set()

    def close(self) -> None:
        """Let the engine's threads end."""
        self.world.close()
        if "other" in vars(self):
            self.other.close()

    @cached_property
    def other(self) -> World:
        """A second engine with the same heads, for fixed choices."""
        return World(STARTER, self.work, kv_tokens=65536)

    def asks(
        self, name: str, learnt: int, number: int, *, temperature: float = 0.0, start: int = 0,
        world: World | None = None,
    ) -> list[Ask]:  # fmt: skip
        """Held-out requests of a project that has served so many; its corpus, heads and counts are made ready."""
        world, namespace = world or self.world, f"{name} {learnt}"
        heads = self.heads.get((name, learnt))
        digest = heads.digest if heads else None
        if digest:
            world.load(digest)
        if (world, namespace) not in self._taught:
            self._taught.add((world, namespace))
            world.learn(namespace, self.logged[name][:learnt])
            warm = prompts(name, "train", self.scale.requests + WARM, self.scale.seed)[-WARM:]
            world.run([Ask(prompt, namespace, 0.0, 0, digest) for prompt in warm], 1)
        places = [(start + at) % HELD_OUT for at in range(number)]
        return [Ask(self.held[name][at], namespace, temperature, at, digest) for at in places]

    def single(self, name: str, learnt: int, temperature: float) -> Cell:
        """One stream: each prompt plain and drafted, in turns."""
        asks = self.asks(name, learnt, self.scale.singles(), temperature=temperature)
        heads = (name, learnt) in self.heads
        return compare(self.world, [[ask] for ask in asks], 1) | {"heads": heads}

    def crowd(self, concurrency: int) -> Cell:
        """Streams of the three applications at once, in blocks of at least as many requests."""
        size = max(concurrency, min(3 * concurrency, 48))
        blocks = [self._mixed(-(-size // 3), number) for number in range(self.scale.pairs)]
        return compare(self.world, blocks, concurrency)

    def unpredictable(self, concurrency: int) -> Cell:
        """Random weights at temperature 1: nothing can be foreseen, and drafting must not cost."""
        model = ensure_model(self.work, "tiny-fp32")
        pairs = self.scale.singles() if concurrency == 1 else self.scale.pairs
        world = World(model, self.work)
        texts = random_prompts(model, pairs * concurrency, NOISE_PROMPT, self.scale.seed)
        asks = [Ask(text, "noise", 1.0, at, most=NOISE_TOKENS) for at, text in enumerate(texts)]
        world.run(asks[:4], 1)
        blocks = [asks[at * concurrency : (at + 1) * concurrency] for at in range(pairs)]
        cell = compare(world, blocks, concurrency)
        world.close()
        return cell

    def hindsight(self, name: str, concurrency: int) -> Cell:
        """The policy against every fixed (drafter, length), in turns; the best of them is chosen afterwards.

        The fixed ones have an engine of their own: what they draft would teach the policy costs it must find by itself.
        """
        pairs = self.scale.singles(2) if concurrency == 1 else self.scale.pairs
        chosen: dict[str, Policy] = {"policy": Adaptive(), **arms()}
        rates: dict[str, list[Rate]] = {arm: [] for arm in chosen}
        for number in range(pairs):
            if concurrency == 1:
                ask_of = partial(self.asks, name, self.scale.requests, 1, start=number)
            else:
                ask_of = partial(self._mixed, -(-max(8, concurrency) // len(APPLICATIONS)), number)
            asks = ask_of()
            ask_of(world=self.other)
            turn = list(chosen)
            random.Random(number).shuffle(turn)
            for arm in turn:
                world = self.world if arm == "policy" else self.other
                world.core.drafting.policy = chosen[arm]
                # Two engines do not fit the caches, and the policy's is always the one that was away.
                world.run(for_arm(chosen[arm], asks)[:1], 1)
                rates[arm].append(decoding(world.run(for_arm(chosen[arm], asks), concurrency)))
        totals = {arm: _per_second(found) for arm, found in rates.items()}
        best = max(arms(), key=totals.__getitem__)
        return _ratio(list(zip(rates["policy"], rates[best], strict=True))) | {"best": best, "rates": totals}

    def training(self) -> Cell:
        """From the logged requests to heads in a slot, by application: the trainer's process, the gate, the load."""
        found: dict[str, dict[str, Any]] = {}
        for name in APPLICATIONS:
            heads = self.heads[name, self.scale.requests]
            self.world.core.unload_speculator(b"benchmark", UnloadSpeculator(id="unload", digest=heads.digest))
            self.world.core.outbox.clear()
            file = report_file(self.work, heads.digest)
            report = msgspec.json.decode(file.read_bytes()) if file.exists() else None
            began = time.perf_counter()
            verdict = judge_report(report, self.world.core.status("").costs) if report else None
            gate = time.perf_counter() - began
            load = timed(partial(self.world.load, heads.digest))
            found[name] = {
                "trainer": heads.seconds, "gate": gate, "load": load, "seconds": heads.seconds + gate + load,
                "tau": heads.tau, "promote": verdict.promote if verdict else None,
                "reasons": verdict.reasons if verdict else [],
            }  # fmt: skip
        return {"applications": found}

    def _mixed(self, each: int, number: int, world: World | None = None) -> list[Ask]:
        """So many requests of every application, shuffled; other ones for another number."""
        last, start = self.scale.requests, number * 7
        found = [ask for name in APPLICATIONS for ask in self.asks(name, last, each, start=start, world=world)]
        random.Random(number).shuffle(found)
        return found


def compare(world: World, blocks: Sequence[Sequence[Ask]], concurrency: int) -> Cell:
    """Plain and drafted, in turns, on each block; decode rates, and tokens a second from end to end."""
    pairs, whole, said = [], [], Counted()
    for number, block in enumerate(blocks):
        sides: dict[bool, Rate] = {}
        ends: dict[bool, Rate] = {}
        for speculate in (True, False) if number % 2 else (False, True):
            began = time.perf_counter()
            told = world.run([ask._replace(speculate=speculate) for ask in block], concurrency)
            ends[speculate] = sum(len(one.tokens) for one in told), time.perf_counter() - began
            sides[speculate] = decoding(told)
            if speculate:
                said.add(told)
        # An answer that came in one message has no decode rate.
        if all(seconds for _, seconds in sides.values()):
            pairs.append((sides[True], sides[False]))
            whole.append((ends[True], ends[False]))
    return _ratio(pairs) | {"end_to_end": interval(whole)[0], **said.figures()}


class Counted:
    """What drafting did in all answers of a cell."""

    def __init__(self) -> None:
        self.tokens = self.steps = self.drafted = self.accepted = 0

    def add(self, told: Iterable[Any]) -> None:
        """Some more answers."""
        for one in told:
            self.tokens += len(one.tokens)
            self.steps += len(one.times)
            self.drafted += one.drafted
            self.accepted += one.accepted

    def figures(self) -> Cell:
        """Tokens a step, drafted tokens for each said, and the share of them that came out."""
        return {
            "tokens_per_step": self.tokens / self.steps,
            "drafted": self.drafted / self.tokens,
            "accepted": self.accepted / max(1, self.drafted),
        }


def for_arm(policy: Policy, asks: Sequence[Ask]) -> list[Ask]:
    """The requests as an engine with nothing but this fixed choice would get them: no work for another drafter."""
    if not isinstance(policy, Fixed):
        return list(asks)
    known = policy.drafter == "heads"
    return [
        ask._replace(speculate=policy.drafter is not None, speculator=ask.speculator if known else None) for ask in asks
    ]


def cells(bench: Bench) -> dict[str, Callable[[], Cell]]:
    """The cells of this file by name, in the order they are measured."""
    found: dict[str, Callable[[], Cell]] = {}
    last = bench.scale.requests
    for name in APPLICATIONS:
        for learnt in bench.scale.sizes:
            found[f"single {name} greedy after {learnt}"] = partial(bench.single, name, learnt, 0.0)
        found[f"single {name} at {TEMPERATURE} after {last}"] = partial(bench.single, name, last, TEMPERATURE)
    found |= {f"crowd {streams}": partial(bench.crowd, streams) for streams in (4, 16, 64)}
    found |= {f"unpredictable {streams}": partial(bench.unpredictable, streams) for streams in (1, 16)}
    found |= {f"hindsight {name} 1": partial(bench.hindsight, name, 1) for name in APPLICATIONS}
    found |= {f"hindsight mixed {streams}": partial(bench.hindsight, "mixed", streams) for streams in (4, 16)}
    return found | {"training": bench.training}


def _ratio(pairs: Sequence[tuple[Rate, Rate]]) -> Cell:
    ratio, low, high = interval(pairs)
    rates = {"ours": _per_second([ours for ours, _ in pairs]), "theirs": _per_second([other for _, other in pairs])}
    return {"ratio": ratio, "low": low, "high": high, "pairs": len(pairs), **rates}


def _per_second(rates: Sequence[Rate]) -> float:
    tokens, seconds = total(rates)
    return tokens / seconds
