"""What the speculation benchmark stands on: logged traffic, heads trained on it, and an engine whose clock is read."""

import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.figures import STARTER
from engine.config import EngineConfig
from engine.core import Engine
from engine.digest import base_digest
from engine.messages import Done, Finished, Generate, LoadSpeculator, Sampling, Tokens, encode
from engine.speculation.manager import vocabulary_digest
from engine.text.tokenizer import Tokenizer
from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from worker.training import artifact
from worker.training.heads import write_requests
from worker.training.spec import HeadsSpec, Request
from worker.training.spec import encode as encode_spec

CLIENT = b"benchmark"
LEAD_TOKENS = 4
MOST_TOKENS = 160
TEMPERATURE = 0.7


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

    @property
    def decode(self) -> tuple[int, float]:
        """Tokens after the first message and the seconds they took."""
        return sum(self.counts[1:]), self.times[-1] - self.times[0]

    @property
    def longest_gap(self) -> float:
        """Seconds of the longest pause between two messages."""
        return max((after - before for before, after in zip(self.times, self.times[1:], strict=False)), default=0.0)


class World:
    """The engine in this process; what it says is encoded as its process would, and timed."""

    def __init__(self, model: Path, artifacts: Path, **options: object) -> None:
        config = EngineConfig(model=model, artifacts=artifacts, prefix_cache=False, **options)  # type: ignore[arg-type]
        self.core = Engine(config)
        self.ends = Tokenizer.load(model).eos_ids if model == STARTER else ()
        self._ids = count()

    def close(self) -> None:
        """Let the engine's threads end."""
        self.core.close()

    def learn(self, namespace: str, requests: Iterable[Request]) -> None:
        """What an engine that served these would have learnt."""
        for request in requests:
            self.core.drafting.corpora.learn(namespace, request.prompt[-LEAD_TOKENS:] + request.answer)

    def load(self, digest: str, replaces: str = "") -> None:
        """Heads into a slot, now."""
        self.core.load_speculator(CLIENT, LoadSpeculator(id="load", digest=digest, path=digest, replaces=replaces))
        while not (done := [m for _, m in self.core.outbox if isinstance(m, Done)]):
            self.core.step()
            time.sleep(0.0002)
        self.core.outbox.clear()
        if done[0].error:
            raise RuntimeError(done[0].error)

    def run(self, asks: Sequence[Ask], concurrency: int, each: Iterator[object] | None = None) -> list[Told]:
        """All asks, `concurrency` at a time, the next as soon as one ends; `each` is advanced once a step."""
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
        return [told[number] for number in range(len(asks))]

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
                if message.reason not in ("stop", "length"):
                    raise RuntimeError(f"a measured request failed: {message.error}")
                del inside[message.id]
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


def prompts(application: str, split: str, number: int, seed: int) -> list[list[int]]:
    """Token ids of prompts of one of the starter's applications."""
    tokenizer = Tokenizer.load(STARTER)
    examples = islice(stream(APPLICATIONS[application], split, seed), number)  # type: ignore[arg-type]
    return [tokenizer.encode_chat(example.messages) for example in examples]


def traffic(work: Path, application: str, number: int, seed: int) -> list[Request]:
    """Logged requests of an application: its train prompts, answered by the starter, every other one at 0.7."""
    file = work / f"traffic-{application}-{number}-{seed}.json"
    if not file.exists():
        world = World(STARTER, work, kv_tokens=65536)
        asks = [
            Ask(prompt, application, temperature=TEMPERATURE * (index % 2), seed=index)
            for index, prompt in enumerate(prompts(application, "train", number, seed))
        ]
        told = world.run(asks, 32)
        world.close()
        logged = [Request(a.prompt, t.tokens, a.temperature, a.seed) for a, t in zip(asks, told, strict=True)]
        file.write_bytes(msgspec.json.encode(logged))
    return msgspec.json.decode(file.read_bytes(), type=list[Request])


class Trained(NamedTuple):
    """Heads that were trained: their digest, how long from the first row read to the artefact, and tau."""

    digest: str
    seconds: float
    tau: dict[str, float]


def trained(work: Path, name: str, logged: list[Request], seed: int) -> Trained:
    """Heads from these requests, by the trainer's own process as a job starts it."""
    file = work / f"heads-{name}-{len(logged)}-{seed}.json"
    if not file.exists():
        room = work / f"train-{name}-{len(logged)}"
        room.mkdir(exist_ok=True)
        began = time.perf_counter()
        write_requests(room / "rows.jsonl", logged)
        spec = HeadsSpec(model=str(STARTER), rows_file=str(room / "rows.jsonl"), out=str(room / "out"), seed=seed)
        (room / "out").mkdir(exist_ok=True)
        (room / "spec.json").write_bytes(encode_spec(spec))
        subprocess.run(
            [sys.executable, "-m", "worker.training.heads", "--spec", str(room / "spec.json")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        report = msgspec.json.decode((room / "out" / "report.json").read_bytes())
        built = artifact.describe_speculator(
            room / "out", base=base_digest(STARTER), vocabulary=vocabulary_digest(STARTER), adapter=None,
            report=report, params={"seed": seed},
        )  # fmt: skip
        artifact.publish(room / "out", built, work)
        file.write_bytes(
            msgspec.json.encode({"digest": built.digest, "seconds": time.perf_counter() - began, "tau": report["tau"]})
        )
    return Trained(**msgspec.json.decode(file.read_bytes()))


def interval(
    pairs: Sequence[tuple[tuple[float, float], tuple[float, float]]], seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of two rates over pairs of ((tokens, seconds), (tokens, seconds)), with its 95 % bootstrap interval."""
    draw = random.Random(seed)

    def ratio(chosen: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> float:
        sums = [sum(pair[side][part] for pair in chosen) for side in (0, 1) for part in (0, 1)]
        return (sums[0] / sums[1]) / (sums[2] / sums[3])

    again = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(1000))
    return ratio(pairs), again[24], again[974]
