"""Engines made to draft: policies and drafters under a test's control, and what answers must not depend on."""

import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import Done, Draft, Finished, Generate, LoadSpeculator, Pooled, PromptLogprobs, Sampling, Tokens
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence
from engine.speculation.acceptance import Counts
from engine.speculation.costs import StepCosts
from engine.speculation.policy import Batch
from engine.speculation.tries import Try, most_drafted, state_of
from tests.engine.constraining import EOS, VOCABULARY

# Proposes up to so many tokens behind a sequence's own.
Drafter = Callable[[Sequence, int], list[int]]
CLIENT = b"c"
# Far more steps than any test needs: a mutant that computes nothing for ever is caught, too.
MOST_STEPS = 5_000

GREEDY: dict[str, Any] = {"temperature": 0.0}
# What may be asked of the sampler, besides greedy.
DRAWN: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 12},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.01},
]
STOPS = (EOS, 11, 12, 13)


@dataclass
class Answer:
    """Everything a client was told about one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)
    end: Finished | None = None
    drafts: list[Draft] = field(default_factory=list)
    speculators: set[str] = field(default_factory=set)
    steps: int = 0

    @property
    def ending(self) -> tuple[str, str, str | None]:
        """How it ended."""
        assert self.end is not None
        return self.end.reason, self.end.code, self.end.error


def prompt(dice: random.Random, most: int = 40) -> list[int]:
    return [dice.randrange(5, VOCABULARY - 20) for _ in range(dice.randint(2, most))]


def asks(
    kinds: list[dict[str, Any]], *, copies: int = 1, seed: int = 0, tokens: int = 36, **more: object
) -> list[Generate]:
    """One request per kind of sampling and copy, with a prompt and a seed of its own."""
    dice = random.Random(seed)
    return [
        Generate(
            id=f"{number}-{copy}",
            prompt=prompt(dice),
            sampling=Sampling(**({"seed": dice.getrandbits(40), "max_tokens": tokens} | kind)),
            **more,
        )
        for number, kind in enumerate(kinds)
        for copy in range(copies)
    ]


def accepted(answers: dict[str, Answer]) -> int:
    return sum(draft.accepted for answer in answers.values() for draft in answer.drafts)


class Stuck(AssertionError):
    """The engine computes and computes."""


def run(
    core: Engine,
    requests: Many[Generate],
    between: Callable[[int], None] = lambda _: None,
    done: list[Done] | None = None,
) -> dict[str, Answer]:
    """Every answer; `between` is told the step's number before each step, `done` gets what orders are answered.

    Nothing is left behind.
    """
    answered = [] if done is None else done
    told = {request.id: Answer() for request in requests}
    for request in requests:
        core.submit(CLIENT, request)
    for step in range(MOST_STEPS):
        if not core.in_flight:
            break
        between(step)
        if not core.step():
            time.sleep(0.0002)
        answered += read(core, told)
    else:
        core.cancel_client(CLIENT)
        raise Stuck(f"{core.in_flight} requests do not end")
    answered += read(core, told)
    assert not core.scheduler.running
    assert core.scheduler.pool.free == core.scheduler.pool.total, "blocks are held when nobody runs"
    return told


def read(core: Engine, told: dict[str, Answer]) -> list[Done]:
    """Empty the outbox into the answers; what else came."""
    done = []
    for _, message in core.outbox:
        if isinstance(message, Done):
            done.append(message)
            continue
        if isinstance(message, Pooled):
            continue
        answer = told[message.id]
        if isinstance(message, Tokens):
            assert answer.end is None
            assert len(message.token_ids) == len(message.logprobs)
            answer.tokens += message.token_ids
            answer.logprobs += message.logprobs
            answer.top += message.top
            answer.drafts += message.drafts
            answer.steps += message.steps
            answer.speculators |= {message.speculator} - {""}
        elif isinstance(message, PromptLogprobs):
            assert not answer.tokens
            answer.prompt, answer.prompt_top = message.logprobs, message.top
        elif isinstance(message, Finished):
            assert answer.end is None
            answer.end = message
    core.outbox = []
    return done


def plain(core: Engine, requests: Many[Generate]) -> dict[str, Answer]:
    """The answers without speculation. Their KV and texts are never found by the others."""
    told = run(core, [replace(request, speculate=False, learn=False, cache_salt="plain") for request in requests])
    assert not any(answer.drafts for answer in told.values())
    return told


def check_equal(fast: dict[str, Answer], slow: dict[str, Answer]) -> None:
    """Token for token, ending for ending; log-probabilities as far as fp32 goes."""
    assert fast.keys() == slow.keys()
    for name, one in fast.items():
        other = slow[name]
        assert one.tokens == other.tokens, name
        assert one.ending == other.ending, name
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-4), name
        assert one.prompt == pytest.approx(other.prompt, abs=2e-4), name
        for tops in ((one.top, other.top), (one.prompt_top, other.prompt_top)):
            flat, known = ([pair for each in top for pair in each] for top in tops)
            assert [token for token, _ in flat] == [token for token, _ in known], name
            assert [value for _, value in flat] == pytest.approx([value for _, value in known], abs=2e-4), name
        check_drafts(one)


def check_drafts(answer: Answer) -> None:
    """What is reported of drafts adds up."""
    won = sum(draft.accepted for draft in answer.drafts if draft.won)
    assert all(0 <= draft.accepted <= draft.drafted for draft in answer.drafts)
    # Tokens behind one that ends the answer came out, but were not wanted.
    assert won + answer.steps >= len(answer.tokens)
    assert answer.end is not None
    assert answer.end.accepted_tokens == won
    assert answer.end.drafted_tokens == sum(draft.drafted for draft in answer.drafts)


class Always:
    """A policy that drafts whatever it can: `lead` says which drafter goes first where both propose."""

    eager = True

    def __init__(self, *, lead: str = "suffix", length: int = 16, branches: bool = True) -> None:
        self.lead, self.length, self.branches = lead, length, branches

    def select(self, tries: Many[Many[Try]], batch: Batch, *, drafting: bool) -> list[tuple[Try | None, int]]:
        """As much of every row's first proposal as the step has room for, some of it left for the second ones."""
        room, chosen = batch.room // 2 if self.branches else batch.room, []
        for each in tries:
            one = next((one for one in each if one.drafter == self.lead), each[0] if each else None)
            length = min(self.length, len(one.tokens), room) if one else 0
            room -= length
            chosen.append((one, length))
        return chosen


class Falling(StepCosts):
    """Steps that cost the less the more they compute: every branch pays."""

    def table(self, rows: int, context: float) -> list[float]:
        """Half for every token more."""
        return [0.5**tokens for tokens in range(self._most + 1)]

    def learn(self, rows: int, tokens: int, context: float, seconds: float) -> None:
        """Nothing to learn."""


def force(core: Engine, *drafters: Drafter, policy: Always | None = None) -> None:
    """Draft in every step: with these in the places of suffix and heads, or with those the engine has."""
    core.drafting.policy = policy or Always()
    core.drafting.costs = Falling(core.config.step_tokens)
    proposing: Any = core.drafting._proposing
    proposing.__dict__.pop("ask", None)
    if not drafters:
        return

    def ask(rows: Many[Row], seconds_per_token: float, *, eager: bool = False) -> list[list[Try]]:
        tries = []
        for row in rows:
            each = state_of(row.sequence).tries = []
            for name, drafter in zip(("suffix", "heads"), drafters, strict=False):
                tokens = drafter(row.sequence, most_drafted(row.sequence))
                if tokens:
                    survival = [0.9 ** (place + 1) for place in range(len(tokens))]
                    each.append(Try(name, tokens, [0] * len(tokens), survival, Counts(1)))  # type: ignore[arg-type]
            tries.append(each)
        return tries

    proposing.ask = ask


@contextmanager
def started(model: Path, artifacts: Path | None = None, **options: object) -> Iterator[Engine]:
    """An fp32 engine on one thread; closed at the end."""
    settings = {"precision": "fp32", "device": "cpu", "threads": 1, "kv_tokens": 8192, "suffix_tokens": 8192} | options
    core = Engine(EngineConfig(model=model, artifacts=artifacts or model, **settings))  # type: ignore[arg-type]
    try:
        yield core
    finally:
        core.close()


def load(core: Engine, digest: str, replaces: str = "") -> Done:
    """Load heads now; the engine's answer."""
    return command(core, core.load_speculator, LoadSpeculator(id="load", digest=digest, path=digest, replaces=replaces))


def command(core: Engine, order: Callable[..., None], message: object) -> Done:
    """Give an order to an idle engine and wait for its Done."""
    order(CLIENT, message)
    for _ in range(20_000):
        core.step()
        for _, answer in core.outbox:
            if isinstance(answer, Done) and answer.id == getattr(message, "id", None):
                core.outbox = []
                return answer
        time.sleep(0.0005)
    raise Stuck("the order is not answered")
