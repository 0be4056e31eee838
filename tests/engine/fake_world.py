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
from engine.speculation.costs import StepCosts
from engine.speculation.heads import Ask, Guess
from engine.speculation.slots import Ready
from engine.speculation.tries import Speculation

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
        # The states that drew the last step's tokens; what heads are given are their places here.
        self.drew: list[int] = []

    def step(self, rows: list[Any]) -> StepOutput:
        own = [row.sequence for row in rows if row.branch is None]
        beside = [row.sequence for row in rows if row.branch is not None]
        assert sum(row.length for row in rows) <= self.core.config.step_tokens
        assert len(set(own)) == len(own) > 0
        assert len(set(beside)) == len(beside)
        assert set(beside) <= set(own)
        states = [self._write(row) for row in rows]
        if self.explode:
            self.explode = False
            raise RuntimeError(MADE_TO_FAIL)
        drawn = [(row, state) for row, each in zip(rows, states, strict=True) if row.samples
                 for state in each[-1 - len(row.drafted) :]]  # fmt: skip
        self.drew = [state for _, state in drawn]
        faults = [NOT_FINITE if row.sequence.request.id in self.poison else None for row, _ in drawn]
        pooled = {row.sequence: torch.ones(row.length, 2) for row in rows if row.sequence.pool is not None}
        tokens = [state % VOCABULARY for state in self.drew]
        sampled = Sampled(tokens, [-1.0] * len(drawn), [[] for _ in drawn], faults)
        return StepOutput(list(rows), sampled, torch.arange(len(drawn))[:, None], pooled)

    def clear(self, blocks: list[int]) -> None:
        """What a block's last holder left is gone."""
        size = self.core.scheduler.pool.block_size
        for page in (block * size + offset for block in blocks for offset in range(size)):
            self.pages.pop(page, None)

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Whole blocks, as far as they were written."""
        size = self.core.scheduler.pool.block_size
        for source, target in blocks:
            for offset in range(size):
                if source * size + offset in self.pages:
                    self.pages[target * size + offset] = self.pages[source * size + offset]

    def _write(self, row: Any) -> list[int]:  # noqa: ANN401
        """Check that all earlier pages hold this text's states, then write the next ones; the states written."""
        sequence, request, size = row.sequence, row.sequence.request, self.core.scheduler.pool.block_size
        assert not sequence.ended
        assert row.length > 0
        state, written = first_state(request.adapter, request.cache_salt), []
        for place, token in enumerate([*sequence.tokens[: sequence.computed], *row.tokens]):
            state = next_state(state, token)
            page = int(row.table[place // size]) * size + place % size
            assert page >= size, "the null block was written or read"
            if place < sequence.computed:
                assert self.pages[page] == state, "a page holds another text"
            else:
                self.pages[page] = state
                written.append(state)
        return written


class FakeHeads:
    """Know the model, and are wrong once in a while. Their input must be the state that drew the last token."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self.slots: set[int] = set()

    def prepare(self, speculator: SimpleNamespace) -> Ready:
        return Ready(speculator, {})  # type: ignore[arg-type]

    def fill(self, slot: int, _: Ready) -> None:
        self.slots.add(slot)

    def clear(self, slot: int) -> None:
        self.slots.remove(slot)

    def propose(self, hidden_RE: torch.Tensor, asks: list[Ask], floor: float = 0.0) -> list[Guess]:
        assert floor >= 0
        return [self._guess(self._runner.drew[int(place)], ask) for place, ask in zip(hidden_RE, asks, strict=True)]

    def _guess(self, state: int, ask: Ask) -> Guess:
        assert ask.slot in self.slots
        assert ask.token == state % VOCABULARY
        tokens, token = [], ask.token
        for _ in range(ask.most):
            state = next_state(state, token)
            token = (state + (state % 7 == 0)) % VOCABULARY
            tokens.append(token)
        return Guess(tokens, [0.9] * len(tokens))


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
        # Heads are named after the adapter whose states they know.
        adapter = digest.partition(" of ")[2] or None
        return SimpleNamespace(digest=digest, adapter=adapter, heads=4, matrices=lambda *_: (None, None))


class Clock(SimpleNamespace):
    """Stands in for `time` in the core: real time plus what the test adds."""

    def __init__(self) -> None:
        import time

        super().__init__(offset=0.0, monotonic=time.monotonic)
        self._now = time.perf_counter

    def perf_counter(self) -> float:
        return self._now() + self.offset


class World:
    """One core on fakes; with `speculation` it drafts."""

    def __init__(self, **options: int | bool) -> None:
        settings = {"kv_tokens": 256, "speculation": False} | options
        config = EngineConfig(model=Path("none"), artifacts=Path("none"), **settings)  # type: ignore[arg-type]
        self.clock = Clock()
        fakes = {"read_spec": lambda _: SPEC, "base_digest": lambda _: "base", "build_forward": make_forward}
        with mock.patch.multiple("engine.core", **fakes), mock.patch.object(StepCosts, "measure"):
            self.core = Engine(config)
        self.runner = self.core.runner = FakeRunner(self.core)  # type: ignore[assignment]
        self.reading = self.core.adapters._thread = FakeThread()  # type: ignore[assignment]
        self.core.adapters.reader = FakeReader()  # type: ignore[assignment]
        self.core.forward.clear, self.core.forward.copy = self.runner.clear, self.runner.copy  # type: ignore[method-assign]
        speculators: Any = self.core.drafting.speculators
        speculators.close()
        speculators._reader, speculators._drafter = FakeReader(), FakeHeads(self.runner)
        self.studying = speculators._thread = FakeThread()

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
    check_drafts(core)
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


def check_drafts(core: Engine) -> None:
    """Nothing of a step's drafts outlives it, and nothing that drafts outlives its request."""
    alive = set(core._sequences.values())
    assert set(core.drafting._proposing._places) <= alive
    for each in alive:
        state = each.speculation
        if isinstance(state, Speculation):
            assert state.branch is None
            assert not state.tries
            assert not state.drafts
            assert state.fed <= len(each.tokens)
    assert not core.scheduler.copies
    speculators = core.drafting.speculators
    assert len({one.slot for one in speculators._residents.values()}) == len(speculators._residents)
    assert {one.slot: one.digest for one in speculators._residents.values()} == {
        slot: digest for slot, digest in enumerate(speculators._digests) if digest
    }
    assert not set(speculators._aliases) & set(speculators._aliases.values())
