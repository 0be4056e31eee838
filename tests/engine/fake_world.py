"""The engine's core without a model: pages hold what was written there, so that every mix-up is seen at once.

A "model" here is a hash chain over adapter, salt and tokens: the state behind a token says everything that token may
depend on, is what pages hold, and decides the next token.
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.layers.sampler import Sampled
from engine.messages import Finished, Generate
from engine.runner.runner import StepOutput
from engine.runner.sampling import NOT_FINITE
from engine.sequence import Sequence

VOCABULARY = 1000
MADE_TO_FAIL = "made to fail"
SPEC = SimpleNamespace(max_positions=4096, vocab_size=VOCABULARY, hidden_size=4, labels=(), layers=0, pad_token=None)


def first_state(adapter: str | None, salt: str) -> int:
    """What stands before the first token."""
    return hash(("text", adapter, salt))


def next_state(state: int, token: int) -> int:
    """The state behind one more token."""
    return hash((state, token))


def expected(request: Generate) -> list[int]:
    """The answer that the model gives to a request nobody disturbs."""
    state, answer = first_state(request.adapter, request.cache_salt), []
    for token in request.prompt:
        state = next_state(state, token)
    for _ in range(request.sampling.max_tokens):
        answer.append(state % VOCABULARY)
        state = next_state(state, answer[-1])
    return answer


class FakeForward:
    """Slots that hold nothing."""

    spec, score, kernels, threads = SPEC, None, "fake", 1
    dtype, device = torch.float32, torch.device("cpu")

    def add_slots(self, slots: int, rank: int) -> None: ...
    def fill(self, *_: object) -> None: ...
    def clear(self, blocks: list[int]) -> None: ...
    def close(self) -> None: ...


class FakeRunner:
    """Writes states into pages and reads them back through the block tables."""

    def __init__(self, core: Engine) -> None:
        self.core = core
        self.pages: dict[int, int] = {}
        self.explode = False
        self.poison: set[str] = set()

    def step(self, rows: list[Any]) -> StepOutput:
        assert sum(row.length for row in rows) <= self.core.config.step_tokens
        assert len({row.sequence for row in rows}) == len(rows) > 0
        states = {row.sequence: self._write(row.sequence, row.length) for row in rows}
        if self.explode:
            self.explode = False
            raise RuntimeError(MADE_TO_FAIL)
        drawn = [row.sequence for row in rows if row.samples]
        tokens = [states[sequence] % VOCABULARY for sequence in drawn]
        faults = [NOT_FINITE if sequence.request.id in self.poison else None for sequence in drawn]
        pooled = {row.sequence: torch.ones(row.length, 2) for row in rows if row.sequence.pool is not None}
        sampled = Sampled(tokens, [-1.0] * len(drawn), [[] for _ in drawn], faults)
        return StepOutput(list(rows), sampled, torch.empty(0), pooled)

    def _write(self, sequence: Sequence, length: int) -> int:
        """Check that all earlier pages hold this text's states, then write the next ones; the last state."""
        assert not sequence.ended
        assert length > 0
        request, size = sequence.request, self.core.scheduler.pool.block_size
        state = first_state(request.adapter, request.cache_salt)
        for place in range(sequence.computed + length):
            state = next_state(state, sequence.tokens[place])
            page = int(sequence.table[place // size]) * size + place % size
            assert page >= size, "the null block was written or read"
            if place < sequence.computed:
                assert self.pages[page] == state, "a page holds another text"
            else:
                self.pages[page] = state
        return state


class FakeThread:
    """Instead of a thread: work is done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Callable[..., Any], *arguments: object) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: work(*arguments)))
        return future

    def finish(self) -> None:
        """Do everything that waits."""
        for future, work in self.waiting:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
        self.waiting = []

    def shutdown(self, **_: object) -> None: ...


class FakeReader:
    """Every digest can be read, except those that begin with "bad"."""

    def read(self, digest: str, path: str) -> SimpleNamespace:
        if digest.startswith("bad"):
            raise OSError("the disk is away")
        return SimpleNamespace(digest=digest, matrices=lambda *_: (None, None))


class Clock(SimpleNamespace):
    """Stands in for `time` in the core: real time plus what the test adds."""

    def __init__(self) -> None:
        import time

        super().__init__(offset=0.0, monotonic=time.monotonic)
        self._now = time.perf_counter

    def perf_counter(self) -> float:
        return self._now() + self.offset


class World:
    """One core on fakes."""

    def __init__(self, **options: int) -> None:
        settings = {"kv_tokens": 256, "speculation": False} | options
        config = EngineConfig(model=Path("none"), artifacts=Path("none"), **settings)  # type: ignore[arg-type]
        self.clock = Clock()
        fakes = {"read_spec": lambda _: SPEC, "base_digest": lambda _: "base", "build_forward": make_forward}
        with mock.patch.multiple("engine.core", **fakes):
            self.core = Engine(config)
        self.runner = self.core.runner = FakeRunner(self.core)  # type: ignore[assignment]
        self.reading = self.core.adapters._thread = FakeThread()  # type: ignore[assignment]
        self.core.adapters.reader = FakeReader()  # type: ignore[assignment]

    def step(self) -> bool:
        """One step on this world's clock. The core answers for steps that fail; only those made to fail may."""
        with mock.patch("engine.core.time", self.clock):
            computed = self.core.step()
        for _, message in self.core.outbox:
            if isinstance(message, Finished) and "the step failed" in (message.error or ""):
                assert MADE_TO_FAIL in (message.error or ""), message.error
        return computed


def make_forward(*_: object, **__: object) -> FakeForward:
    return FakeForward()


def check(core: Engine) -> None:
    """Everything that must hold between any two steps."""
    check_blocks(core)
    check_prefix(core)
    check_slots(core)
    promised = core.scheduler._promised
    assert set(promised.values()) <= set(core.scheduler.running)
    assert sorted(promised) == sorted(key for each in core.scheduler.running for key in each.promises)
    assert core.admission._in_flight == len(core._sequences)
    assert core.scheduler.running == sorted(core.scheduler.running, key=lambda each: each.rank)
    assert len(core.scheduler.waiting) == len(list(core.scheduler.waiting))
    assert not any(each.ended for each in (*core.scheduler.running, *core.scheduler.waiting))


def check_blocks(core: Engine) -> None:
    """References are exactly those of running sequences; every block is free, idle or held, and only one of these."""
    pool = core.scheduler.pool
    held = [0] * (pool.total + 1)
    for sequence in core.scheduler.running:
        for block in sequence.blocks:
            held[block] += 1
    assert pool.references == held
    busy = {block for block, references in enumerate(held) if references}
    free, idle = set(pool._free), set(pool._idle)
    assert len(pool._free) == len(free)
    assert free | idle | busy == set(range(1, pool.total + 1))
    assert len(free) + len(idle) + len(busy) == pool.total
    assert idle <= pool._kept
    assert not pool._kept & free


def check_prefix(core: Engine) -> None:
    """Every cached block has its predecessors, and nobody holds one without them."""
    prefix, pool = core.scheduler.prefix, core.scheduler.pool
    assert prefix is not None
    nodes = list(prefix._nodes.values())
    assert {node.block for node in nodes} == pool._kept == set(prefix._by_block)
    children: dict[int, int] = {}
    for node in nodes:
        children[id(node.parent)] = children.get(id(node.parent), 0) + 1
        before = node.parent
        if before is node.root:
            assert prefix._roots[node.root.name] is node.root
        else:
            assert prefix._nodes[before.key] is before
            assert pool.references[before.block] >= pool.references[node.block]
    for each in (*nodes, *prefix._roots.values()):
        assert each.children == children.get(id(each), 0)


def check_slots(core: Engine) -> None:
    """A slot's references are the unfinished requests that were started on it."""
    started = [each.request.adapter for each in core._sequences.values() if each.slot]
    for resident in core.adapters.slots._residents.values():
        assert resident.references == started.count(resident.digest)
    assert set(started) <= set(core.adapters.slots._residents)
