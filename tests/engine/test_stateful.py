"""Any order of anything: requests, vectors, cancels, deadlines, adapters, failures. Nothing leaks, all end once."""

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from engine.messages import (
    Done,
    Finished,
    Forget,
    Generate,
    Learn,
    LoadAdapter,
    LoadSpeculator,
    Pool,
    Pooled,
    Sampling,
    Tokens,
    UnloadAdapter,
    UnloadSpeculator,
)
from engine.speculation.policy import Adaptive
from tests.engine.fake_world import World, check, expected
from tests.engine.lossless import Always, Falling

ADAPTERS = ["a", "b", "c", "d", "bad"]
adapters = st.sampled_from([None, None, *ADAPTERS])
SPECULATORS = ["one", "two", "three", "four of a", "bad"]
speculators = st.sampled_from(["one", None, *SPECULATORS])
# Prompts are beginnings of a few texts, so that they share blocks and part from each other everywhere.
prompts = st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(0, 40))


def text(shape: tuple[int, int, int]) -> list[int]:
    which, shared, own = shape
    return [which] * shared + [which + 10] * own


class Anything(RuleBasedStateMachine):
    """256 tokens of pages, three slots, five at once: everything is short."""

    SPECULATION = False

    def __init__(self) -> None:
        super().__init__()
        options = {"max_running": 5, "step_tokens": 48, "adapter_slots": 3, "max_waiting": 30, "speculator_slots": 2}
        self.world = World(speculation=self.SPECULATION, **options)
        self.core = self.world.core
        self.asked: dict[str, Generate | Pool] = {}
        self.gone: set[str] = set()
        self.commands: set[str] = set()
        self.sent: dict[str, list[int]] = {}
        self.endings: Counter[str] = Counter()
        self.done: Counter[str] = Counter()

    @rule(
        shape=prompts, tokens=st.integers(1, 60), adapter=adapters, salt=st.sampled_from(["", "", "s"]),
        urgent=st.booleans(), share=st.sampled_from("xyz"), late=st.integers(0, 3), copies=st.integers(1, 3),
        speculator=speculators, quiet=st.integers(0, 5),
    )  # fmt: skip
    def submit(
        self, shape: tuple[int, int, int], tokens: int, adapter: str | None, salt: str, urgent: bool, share: str,
        late: int, copies: int, speculator: str | None, quiet: int,
    ) -> None:  # fmt: skip
        for choice in range(copies):
            request = Generate(
                id=str(len(self.asked)), prompt=text(shape), sampling=Sampling(seed=0, max_tokens=tokens),
                adapter=adapter, cache_salt=salt, namespace=salt or "n", share=share, choice=choice,
                priority="interactive" if urgent else "batch", deadline_seconds=60.0 if late == 3 else 0.0,
                speculator=speculator, speculate=quiet != 4, learn=quiet != 5,
            )  # fmt: skip
            self.asked[request.id] = request
            self.core.submit(self.client(request.id), request)

    @rule(shape=prompts, adapter=adapters, how=st.sampled_from(["last", "mean", "first", "classify"]))
    def pool(self, shape: tuple[int, int, int], adapter: str | None, how: str) -> None:
        request = Pool(id=str(len(self.asked)), prompt=text(shape), how=how, adapter=adapter)
        self.asked[request.id] = request
        self.core.submit_pool(self.client(request.id), request)

    @rule(index=st.integers(0, 60))
    def cancel(self, index: int) -> None:
        self.core.cancel(self.client(str(index)), str(index))
        assert (self.client(str(index)), str(index)) not in self.core._sequences

    @rule(number=st.integers(0, 3))
    def vanish(self, number: int) -> None:
        self.read()
        self.core.cancel_client(bytes([number]))
        self.gone |= {name for name in self.asked if self.client(name) == bytes([number])}

    @rule(digest=st.sampled_from(ADAPTERS), load=st.booleans(), finish=st.booleans())
    def adapt(self, digest: str, load: bool, finish: bool) -> None:
        name = self.command()
        if load:
            self.core.load_adapter(b"c", LoadAdapter(id=name, digest=digest, path=digest))
        else:
            self.core.unload_adapter(b"c", UnloadAdapter(id=name, digest=digest))
        if finish:
            self.world.reading.finish()

    @rule(namespace=st.sampled_from(["n", "s"]))
    def forget(self, namespace: str) -> None:
        self.core.forget(b"c", Forget(id="forget", namespace=namespace))

    @rule(steps=st.integers(1, 30))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @rule()
    def explode(self) -> None:
        self.world.runner.explode = True

    @rule(index=st.integers(0, 60))
    def poison(self, index: int) -> None:
        self.world.runner.poison.add(str(index))

    @rule(seconds=st.sampled_from([1.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock.offset += seconds

    @invariant()
    def holds(self) -> None:
        check(self.core)
        self.read()
        assert all(self.endings[name] == 0 for _, name in self.core._sequences)

    def teardown(self) -> None:
        """Left alone, everything ends within a bounded number of steps, and nothing is held."""
        owed = sum(len(each.tokens) + each.limit for each in self.core._sequences.values())
        for _ in range(40 + 4 * owed):
            self.world.reading.finish()
            self.world.studying.finish()
            if not self.world.step() and not (self.core._sequences or self.core.busy or self.world.reading.waiting):
                break
        self.holds()
        assert not self.core._sequences, "a request starves"
        status = self.core.status("check")
        assert (status.running, status.waiting, status.blocks_free) == (0, 0, status.blocks_total)
        assert all(slot.references == 0 for slot in status.slots)
        assert all(self.endings[name] == 1 for name in self.asked.keys() - self.gone)
        assert all(self.endings[name] <= 1 for name in self.asked)
        assert all(self.done[name] == 1 for name in self.commands)
        assert not self.core.scheduler.waiting._lines[0]
        assert not self.core._deadlines._open
        self.core.scheduler.prefix.forget("n")
        self.core.scheduler.prefix.forget("s")
        self.core.close()

    def read(self) -> None:
        """Empty the outbox: answers are what the model says, as far as they go."""
        for _, message in self.core.outbox:
            if isinstance(message, Tokens):
                self.sent.setdefault(message.id, []).extend(message.token_ids)
            elif isinstance(message, Finished | Pooled):
                self.endings[message.id] += 1
                self.judge(message)
            elif isinstance(message, Done):
                self.done[message.id] += 1
        self.core.outbox = []

    def judge(self, ending: Finished | Pooled) -> None:
        request = self.asked[ending.id]
        if isinstance(ending, Pooled):
            assert len(ending.vector) == 8
            return
        tokens = self.sent.pop(ending.id, [])
        assert ending.completion_tokens == len(tokens)
        assert ending.cached_tokens < len(request.prompt)
        if isinstance(request, Generate):
            answer = expected(request)
            assert tokens == answer[: len(tokens)]
            if ending.reason == "length":
                assert len(tokens) == min(len(answer), self.core.max_context - len(request.prompt))

    def command(self) -> str:
        name = f"command {len(self.commands)}"
        self.commands.add(name)
        return name

    @staticmethod
    def client(name: str) -> bytes:
        return bytes([int(name) % 4])


class Drafting(Anything):
    """The same with drafts in every step: both drafters', two of one row; heads come and go, texts are learnt."""

    SPECULATION = True

    def __init__(self) -> None:
        super().__init__()
        self.core.drafting.costs = Falling(self.core.config.step_tokens)
        self.steer("heads", 16, True)
        for digest in SPECULATORS[:2]:
            self.load_heads(digest, None, True)
        self.world.step()

    @rule(lead=st.sampled_from(["suffix", "heads"]), length=st.integers(1, 16), branches=st.booleans())
    def steer(self, lead: str, length: int, branches: bool) -> None:
        self.core.drafting.policy = Always(lead=lead, length=length, branches=branches)

    @rule(index=st.integers(0, 20), steps=st.integers(1, 30), named=st.booleans())
    def again(self, index: int, steps: int, named: bool) -> None:
        """Ask what was asked before: its answer may be known by now."""
        before = self.asked.get(str(index))
        if isinstance(before, Generate):
            heads = before.speculator if named or before.adapter else "one"
            request = replace(before, id=str(len(self.asked)), speculator=heads, speculate=True)
            self.asked[request.id] = request
            self.core.submit(self.client(request.id), request)
        self.step(steps)

    @rule()
    def weigh(self) -> None:
        self.core.drafting.policy = Adaptive()

    @rule(digest=st.sampled_from(SPECULATORS), replaces=speculators, finish=st.booleans())
    def load_heads(self, digest: str, replaces: str | None, finish: bool) -> None:
        name = self.command()
        order = LoadSpeculator(id=name, digest=digest, path=digest, replaces=replaces or "")
        self.core.load_speculator(b"c", order)
        if finish:
            self.world.studying.finish()

    @rule(digest=st.sampled_from(SPECULATORS))
    def unload_heads(self, digest: str) -> None:
        self.core.unload_speculator(b"c", UnloadSpeculator(id=self.command(), digest=digest))

    @rule(shape=prompts, tokens=st.integers(1, 60), salt=st.sampled_from(["", "s"]))
    def learn(self, shape: tuple[int, int, int], tokens: int, salt: str) -> None:
        """What will be asked, and what was never said."""
        sampling, prompt = Sampling(seed=0, max_tokens=tokens), text(shape)
        said = prompt[-4:] + expected(Generate(id="", prompt=prompt, sampling=sampling, cache_salt=salt))
        self.core.learn(b"c", Learn(id=self.command(), namespace=salt or "n", responses=[said, said[::-1]]))


TestAnything = Anything.TestCase
TestDrafting = Drafting.TestCase
TestAnything.settings = settings(
    max_examples=3000,
    stateful_step_count=10,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestDrafting.settings = settings(TestAnything.settings, max_examples=500, stateful_step_count=20)
