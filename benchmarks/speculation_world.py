"""What the speculation benchmark stands on: an engine in this process, whose clock is read at every message."""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import STARTER
from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import Done, Finished, Generate, LoadAdapter, LoadSpeculator, Sampling, Tokens, encode
from engine.text.tokenizer import Tokenizer
from worker.training.spec import Request

CLIENT = b"benchmark"
LEAD_TOKENS = 4
# Every application's heads at two sizes, those of the mixed batch, and one to swap with.
SPECULATOR_SLOTS = 12
MOST_TOKENS = 160
RESAMPLES = 1000
# Tokens (or bytes, or requests) and the seconds they took.
Rate = tuple[float, float]


class Ask(NamedTuple):
    """One request to be measured. `namespace` names the corpus, `speculator` and `adapter` digests."""

    prompt: list[int]
    namespace: str
    temperature: float = 0.0
    seed: int = 0
    speculator: str | None = None
    adapter: str | None = None
    speculate: bool = True
    most: int = MOST_TOKENS


@dataclass
class Told:
    """One answer with the times its messages left the engine, in seconds."""

    began: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    failure: str = ""

    @property
    def decode(self) -> tuple[int, float]:
        """Tokens after the first message and the seconds they took."""
        return sum(self.counts[1:]), self.times[-1] - self.times[0]

    @property
    def longest_gap(self) -> float:
        """Seconds of the longest pause between two messages."""
        return max((after - before for before, after in pairwise(self.times)), default=0.0)


class World:
    """The engine in this process; what it says is encoded as its process would, and timed."""

    def __init__(self, model: Path, artifacts: Path, **options: object) -> None:
        chosen: dict[str, Any] = {"prefix_cache": False, "speculator_slots": SPECULATOR_SLOTS, **options}
        self.core = Engine(EngineConfig(model=model, artifacts=artifacts, **chosen))
        self.ends = Tokenizer.load(model).eos_ids if model == STARTER else ()
        # What the engine said about loads, oldest first.
        self.answers: list[Done] = []
        self._ids = count()

    def close(self) -> None:
        """Let the engine's threads end."""
        self.core.close()

    def learn(self, namespace: str, requests: Iterable[Request]) -> None:
        """What an engine that served these would have learnt."""
        for request in requests:
            self.core.drafting.corpora.learn(namespace, request.prompt[-LEAD_TOKENS:] + request.answer)

    def load(self, digest: str) -> None:
        """Heads into a slot, now. Raises RuntimeError when the engine refuses them."""
        self._await(self.core.load_speculator, LoadSpeculator(id="load", digest=digest, path=digest))

    def load_adapter(self, digest: str, path: str) -> None:
        """An adapter into a slot, now."""
        self._await(self.core.load_adapter, LoadAdapter(id="load", digest=digest, path=path))

    def run(
        self, asks: Sequence[Ask], concurrency: int, each: Iterator[object] | None = None, *, strict: bool = True
    ) -> list[Told]:
        """All asks, `concurrency` at a time, the next as soon as one ends; `each` is advanced once a step.

        Raises RuntimeError when one fails, unless not `strict`: then its `failure` says why.
        """
        waiting = list(enumerate(asks))[::-1]
        told: dict[int, Told] = {}
        inside: dict[str, Told] = {}
        while waiting or inside:
            while waiting and len(inside) < concurrency:
                number, ask = waiting.pop()
                name = f"{next(self._ids)}"
                inside[name] = told[number] = Told(time.perf_counter())
                self.core.submit(CLIENT, self._request(name, ask))
            self.core.step()
            if each is not None:
                next(each, None)
            self._collect(inside)
        failed = [one.failure for one in told.values() if one.failure]
        if failed and strict:
            raise RuntimeError(f"{len(failed)} measured requests failed: {failed[0]}")
        return [told[number] for number in range(len(asks))]

    def _await(self, order: Callable[[bytes, Any], None], message: LoadSpeculator | LoadAdapter) -> None:
        known = len(self.answers)
        order(CLIENT, message)
        while len(self.answers) == known:
            self.idle()
        if self.answers[-1].error:
            raise RuntimeError(f"{message.digest[:12]}: {self.answers[-1].error}")

    def idle(self) -> None:
        """A step with nothing to serve: what was ordered goes on."""
        self.core.step()
        self._collect({})
        time.sleep(0.0002)

    def _collect(self, inside: dict[str, Told]) -> None:
        for _, message in self.core.outbox:
            encode(message)
            if isinstance(message, Tokens):
                one = inside[message.id]
                one.tokens += message.token_ids
                one.times.append(time.perf_counter())
                one.counts.append(len(message.token_ids))
                one.drafted += sum(draft.drafted for draft in message.drafts)
                one.accepted += sum(draft.accepted for draft in message.drafts if draft.won)
            elif isinstance(message, Finished):
                one = inside.pop(message.id)
                one.failure = "" if message.reason in ("stop", "length") else f"{message.reason}: {message.error}"
            elif isinstance(message, Done):
                self.answers.append(message)
        self.core.outbox.clear()

    def _request(self, name: str, ask: Ask) -> Generate:
        sampling = Sampling(
            temperature=ask.temperature, seed=ask.seed, max_tokens=ask.most, stop_token_ids=tuple(self.ends)
        )
        return Generate(
            id=name,
            prompt=ask.prompt,
            sampling=sampling,
            namespace=ask.namespace,
            speculator=ask.speculator,
            adapter=ask.adapter,
            speculate=ask.speculate,
            learn=False,
        )


def decoding(told: Iterable[Told]) -> Rate:
    """Tokens and seconds of decoding, over the streams."""
    return total(one.decode for one in told)


def interval(pairs: Sequence[tuple[Rate, Rate]], seed: int = 0) -> tuple[float, float, float]:
    """Ratio of two rates over all pairs, each with its own tokens and seconds; and its 95 % bootstrap interval."""
    draw = random.Random(seed)
    again = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return ratio(pairs), again[RESAMPLES // 40 - 1], again[-RESAMPLES // 40]


def ratio(pairs: Sequence[tuple[Rate, Rate]]) -> float:
    """Rate of the first sides over rate of the second."""
    ours, theirs = (total(pair[side] for pair in pairs) for side in (0, 1))
    return (ours[0] / ours[1]) / (theirs[0] / theirs[1])


def total(rates: Iterable[Rate]) -> Rate:
    """Tokens and seconds, each added up."""
    known = list(rates)
    return sum(tokens for tokens, _ in known), sum(seconds for _, seconds in known)
