"""What to verify in the next step: every drafter's proposal for every row, weighed for the whole batch.

Every proposal is scored on the tokens that the step reveals, verified or not: the choice between drafters learns from
all of them. Nothing here can change a token; it only decides what is computed ahead.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine.adapters.manager import Answer
from engine.config import EngineConfig
from engine.layers.sampler import Draw
from engine.messages import Draft, Drafter
from engine.runner.runner import Runner
from engine.scheduling.scheduler import Branch, Row, Scheduler
from engine.sequence import Sequence
from engine.speculation.acceptance import HEADS_CELLS, SUFFIX_CELLS, Acceptance, Counts, heads_cells, suffix_cells
from engine.speculation.corpora import Corpora, Memory, propose
from engine.speculation.costs import StepCosts
from engine.speculation.heads import Ask
from engine.speculation.manager import Speculators
from engine.speculation.policy import branch_pays, least_chance, lengths
from engine.speculation.rehearsal import rehearsal
from engine.speculation.verify import Verified

MOST_DRAFTED = 16
# Prompt tokens that are learnt with a response, so that its first tokens can be drafted too.
LEAD_TOKENS = 4
# A batch whose next token must be this sure to pay is full; every so many steps it is looked at all the same.
HOPELESS, PROBE_STEPS = 0.97, 64
# Drafts that survive with less than this are not worth their arithmetic.
FAINT = 0.02
# Both drafters are asked for a row every so many steps, so that the one that is not chosen stays known.
COMPARE_STEPS = 8
# What learning past responses may take of a step.
STUDY_SECONDS = 0.001
SMOOTH = 0.05
# Costs change slowly; not every step need be looked at.
LEARN_STEPS = 4
# Lengths of context that step costs are told apart by.
CONTEXTS = [64, 256, 1024]


class Try(NamedTuple):
    """A proposal for one row: its tokens, the cells they are counted in, and how likely each is to be reached."""

    drafter: Drafter
    tokens: list[int]
    cells: list[int]
    survival: list[float]
    counts: Counts
    slot: int = 0

    @property
    def expected(self) -> float:
        """Tokens it would add if all of it were verified."""
        return sum(self.survival)


@dataclass(eq=False)
class Speculation:
    """What a sequence keeps for its drafts."""

    memory: Memory | None = None
    fed: int = 0
    tries: list[Try] = field(default_factory=list)
    branch: Branch | None = None
    # Drafts that the last step verified, to be reported.
    drafts: list[Draft] = field(default_factory=list)
    slot: int = 0


class Drafting:
    """Proposes, chooses, and learns from what was verified. One engine's; knows no requests' lives."""

    def __init__(
        self, corpora: Corpora, speculators: Speculators, costs: StepCosts, scheduler: Scheduler, *, active: bool = True
    ) -> None:
        self.corpora, self.speculators, self.costs = corpora, speculators, costs
        self._scheduler = scheduler
        self._active = active
        self._lessons: deque[Lesson] = deque()
        self._suffix, self._heads = Acceptance(SUFFIX_CELLS), Acceptance(HEADS_CELLS)
        self._hidden_RE = torch.empty(0, 0)
        self._places: dict[Sequence, int] = {}
        self._steps = 0
        self._drafted = False
        # What a full proposal of some heads has been worth, and what asking for one costs.
        self._worth: dict[int, float] = {}
        self._ask_seconds = 0.0

    @property
    def restless(self) -> bool:
        """Whether `prepare` would get on."""
        return bool(self._lessons) or self.speculators.restless

    def prepare(self) -> None:
        """Between two steps: install heads that were read, and learn a little of what was sent to be learnt."""
        self.speculators.settle()
        if self._lessons:
            self._study(time.perf_counter() + STUDY_SECONDS)

    def study(self, namespace: str, responses: list[list[int]], answer: Answer) -> None:
        """Learn past responses, a few in each step; `answer` hears when all are."""
        self._lessons.append(Lesson(namespace, deque(responses), answer))

    def close(self) -> None:
        """End the thread that reads artefacts."""
        self.speculators.close()

    def plan(self, rows: list[Row], step_tokens: int) -> list[Row]:
        """The rows with drafts behind those that should have one; with them the step has at most `step_tokens`."""
        self._steps += 1
        able = [index for index, row in enumerate(rows) if _may_draft(row)] if self._active else []
        if not able:
            return rows
        batch = Batch.of(rows, self.costs)
        room = step_tokens - batch.tokens
        if room <= 0:
            return rows
        probing = self._steps % PROBE_STEPS == 0
        if batch.floor >= HOPELESS and not probing:
            self._drafted = False
            return rows
        tries = self._propose([rows[index] for index in able], batch)
        best = [max(each, key=lambda one: one.expected, default=None) for each in tries]
        survivals = [[] if one is None else one.survival for one in best]
        costs = batch.costs[: batch.tokens + room + 1]
        chosen = lengths(survivals, batch.tokens, batch.expected, costs, drafting=self._drafted)
        self._drafted = any(chosen)
        planned = list(rows)
        for index, length, one in zip(able, chosen, best, strict=True):
            if length and one is not None:
                planned[index] = self._with_draft(rows[index], one.tokens[:length])
        if self._drafted:
            planned += self._branches(planned, able, tries, batch)
        return planned

    def choose(self, verified: list[Verified]) -> list[Verified]:
        """One entry for each sequence: the draft of which more came out. Blocks of the other are let go.

        Both are verified with the same noise, so the shorter answer is the beginning of the longer one.
        """
        winners: dict[Sequence, Verified] = {}
        for each in verified:
            other = winners.get(each.row.sequence)
            if other is None or (each.accepted, other.row.branch is not None) > (other.accepted, False):
                winners[each.row.sequence] = each
        for each in verified:
            if each.row.drafted:
                self._note(each, won=winners[each.row.sequence] is each)
        for sequence, each in winners.items():
            self._join(sequence, each)
        return list(winners.values())

    def settle(self, verified: Verified, emitted: list[int]) -> tuple[list[Draft], str]:
        """Learn from what a sequence's step revealed; its drafts, and the digest of the heads among them ("": none)."""
        sequence = verified.row.sequence
        state = sequence.speculation
        if not isinstance(state, Speculation):
            return [], ""
        for one in state.tries:
            acceptance = self._suffix if one.drafter == "suffix" else self._heads
            for token, cell, came in zip(one.tokens, one.cells, emitted, strict=False):
                acceptance.learn(one.counts, cell, token == came)
                if token != came:
                    break
        state.tries = []
        drafts, slot = state.drafts, state.slot
        state.drafts, state.slot = [], 0
        for draft in drafts:
            sequence.drafted += draft.drafted
            sequence.accepted += draft.accepted if draft.won else 0
        return drafts, self.speculators.digest(slot) if slot else ""

    def remember(self, verified: list[Verified], hidden_RE: torch.Tensor) -> None:
        """Keep the head's input at the places that drew each sequence's last token; what heads draft from."""
        self._places = {}
        alive = [each for each in verified if not each.row.sequence.ended and each.row.sequence.request.speculator]
        if alive and self._active:
            places = torch.tensor([each.first + each.accepted for each in alive], device=hidden_RE.device)
            self._hidden_RE = hidden_RE[places].float()
            self._places = {each.row.sequence: index for index, each in enumerate(alive)}

    def timed(self, rows: Many[Row], seconds: float) -> None:
        """A step of these rows took so long, all in all. Steps that read prompts say nothing about generating."""
        if self._steps % LEARN_STEPS == 0 and all(row.samples for row in rows):
            tokens = sum(row.length for row in rows)
            self.costs.learn(tokens, sum(row.sequence.computed for row in rows) / len(rows), seconds)

    def end(self, sequence: Sequence, *, learn: bool) -> None:
        """Let go of what a sequence holds; its answer joins its namespace's corpus."""
        state, request = sequence.speculation, sequence.request
        if learn and self._active and request.learn and sequence.produced > 1:
            self.corpora.learn(request.namespace, sequence.tokens[-(sequence.produced + LEAD_TOKENS) :])
        if isinstance(state, Speculation):
            if state.memory is not None:
                state.memory.close()
            self._scheduler.prune(state.branch)
            sequence.speculation = None
        self._places.pop(sequence, None)

    def forget(self, namespace: str) -> None:
        """Drop what was learnt of a namespace."""
        self.corpora.forget(namespace)
        self._suffix.forget(namespace)
        for lesson in self._lessons:
            if lesson.namespace == namespace:
                lesson.responses.clear()

    def _propose(self, rows: list[Row], batch: "Batch") -> list[list[Try]]:
        """Every drafter's proposals, row by row; also kept on the sequences, to be scored."""
        tries: list[list[Try]] = [_state(row.sequence).tries for row in rows]
        for each in tries:
            each.clear()
        for one, each in zip(self._from_suffix(rows), tries, strict=True):
            if one is not None:
                each.append(one)
        if self._places:
            self._from_heads(rows, tries, batch)
        return tries

    def _from_suffix(self, rows: list[Row]) -> list[Try | None]:
        memories, draws, most = [], [], []
        for row in rows:
            sequence = row.sequence
            memories.append(self._memory(sequence))
            draws.append(_draw(sequence) if sequence.request.sampling.temperature > 0 else None)
            most.append(_most(sequence))
        tries: list[Try | None] = []
        for row, proposal in zip(rows, propose(memories, draws, most), strict=True):
            if not proposal.tokens:
                tries.append(None)
                continue
            own = self._suffix.project(row.sequence.request.namespace)
            cells = suffix_cells(proposal.match, proposal.shares)
            survival = self._suffix.survival(own, cells, proposal.shares)
            tries.append(Try("suffix", proposal.tokens, cells, survival, own))
        return tries

    def _memory(self, sequence: Sequence) -> Memory:
        """The sequence's own index, with all tokens it has now."""
        state = _state(sequence)
        if state.memory is None:
            state.memory = self.corpora.open(sequence.request.namespace, sequence.request.prompt)
            state.fed = len(sequence.request.prompt)
        if state.fed < len(sequence.tokens):
            state.memory.extend(sequence.tokens[state.fed :])
            state.fed = len(sequence.tokens)
        return state.memory

    def _from_heads(self, rows: list[Row], tries: list[list[Try]], batch: "Batch") -> None:
        asked, asks, places = [], [], []
        compare = self._steps % COMPARE_STEPS == 0
        for row, each in zip(rows, tries, strict=True):
            sequence, request = row.sequence, row.sequence.request
            place = self._places.get(sequence)
            slot = self.speculators.slot(request.speculator, request.adapter) if place is not None else 0
            if place is None or not slot:
                continue
            missing = self._worth.get(slot, 1.0) - (each[0].expected if each else 0.0)
            if compare or missing * batch.seconds_per_token > self._ask_seconds:
                asked.append((row, each, slot))
                most = min(_most(sequence), self.speculators.heads(slot))
                asks.append(Ask(slot, sequence.tokens[-1], _draw(sequence), most))
                places.append(place)
        if not asks:
            return
        began = time.perf_counter()
        guesses = self.speculators.propose(self._hidden_RE[places], asks, FAINT)
        seconds = (time.perf_counter() - began) / len(asks)
        self._ask_seconds += SMOOTH * (seconds - self._ask_seconds)
        for (row, each, slot), guess in zip(asked, guesses, strict=True):
            own = self._heads.project(f"{self.speculators.digest(slot)} {row.sequence.request.namespace}")
            cells = heads_cells(guess.chances)
            survival = self._heads.survival(own, cells, guess.chances)
            one = Try("heads", guess.tokens, cells, survival, own, slot)
            self._worth[slot] = (1 - SMOOTH) * self._worth.get(slot, one.expected) + SMOOTH * one.expected
            each.append(one)

    def _with_draft(self, row: Row, tokens: list[int]) -> Row:
        """The row with as many of these tokens behind it as there are blocks for."""
        fits = self._scheduler.stretch(row.sequence, len(tokens))
        if fits <= 0:
            return row
        return row._replace(length=row.length + fits, drafted=tuple(tokens[:fits]))

    def _branches(self, planned: list[Row], able: list[int], tries: list[list[Try]], batch: "Batch") -> list[Row]:
        """Second drafts, verified beside the first where that raises the rate: both share the noise, and the prefix."""
        tokens = sum(row.length for row in planned)
        expected = batch.expected + sum(
            sum(_of(each, planned[index]).survival[: len(planned[index].drafted)])
            for index, each in zip(able, tries, strict=True)
            if planned[index].drafted
        )
        branches = []
        for index, each in zip(able, tries, strict=True):
            row = planned[index]
            if len(each) < 2 or not row.drafted or row.length != 1 + len(row.drafted):
                continue
            first = _of(each, row)
            second = each[1] if first is each[0] else each[0]
            gain, length = second_gain(first, second, len(row.drafted))
            if length and branch_pays(gain, 1 + length, tokens, expected, batch.costs):
                branch = self._scheduler.fork(row.sequence, 1 + length)
                if branch is None:
                    continue
                _state(row.sequence).branch = branch
                branches.append(Row(row.sequence, 1 + length, tuple(second.tokens[:length]), branch.table))
                tokens, expected = tokens + 1 + length, expected + gain
        return branches

    def _note(self, verified: Verified, *, won: bool) -> None:
        """Keep what is to be reported of a verified draft."""
        state = _state(verified.row.sequence)
        one = _of(state.tries, verified.row)
        state.drafts.append(Draft(one.drafter, len(verified.row.drafted), verified.accepted, won))
        state.slot = state.slot or one.slot

    def _join(self, sequence: Sequence, winner: Verified) -> None:
        """Go on with the blocks of the branch if it won, without it if not."""
        state = sequence.speculation
        if not isinstance(state, Speculation) or state.branch is None:
            return
        if winner.row.branch is not None:
            self._scheduler.adopt(sequence, state.branch)
        else:
            self._scheduler.prune(state.branch)
        state.branch = None

    def _study(self, until: float) -> None:
        while self._lessons:
            lesson = self._lessons[0]
            while lesson.responses:
                self.corpora.learn(lesson.namespace, lesson.responses.popleft())
                if time.perf_counter() > until:
                    return
            self._lessons.popleft()
            lesson.answer("")


class Lesson(NamedTuple):
    """Responses that are still to be learnt, and who hears when they are."""

    namespace: str
    responses: deque[list[int]]
    answer: Answer


class Batch(NamedTuple):
    """The step as it is without drafts: its tokens, what they yield, and what a step of more tokens costs."""

    tokens: int
    expected: int
    context: float
    costs: list[float]
    floor: float

    @classmethod
    def of(cls, rows: Many[Row], costs: StepCosts) -> "Batch":
        """Count a step's rows."""
        tokens = sum(row.length for row in rows)
        expected = sum(row.samples for row in rows)
        context = sum(row.sequence.computed for row in rows) / len(rows)
        table = costs.table(context)
        return cls(tokens, expected, context, table, least_chance(tokens, expected, table))

    @property
    def seconds_per_token(self) -> float:
        """What one more emitted token is worth."""
        return self.costs[min(self.tokens, len(self.costs) - 1)] / max(1, self.expected)


def second_gain(first: Try, second: Try, length: int) -> tuple[float, int]:
    """What a second draft adds to `length` tokens of the first, and how long it should be; nothing while they agree.

    It helps only where the first has failed, so its chance there is at most what the first leaves.
    """
    fork = 0
    while fork < min(length, len(second.tokens)) and first.tokens[fork] == second.tokens[fork]:
        fork += 1
    if fork >= length or fork >= len(second.tokens):
        return 0.0, 0
    reached = first.survival[fork - 1] if fork else 1.0
    own = second.survival[fork - 1] if fork else 1.0
    left = reached - first.survival[fork]
    gain, until = 0.0, 0
    for place in range(fork, len(second.tokens)):
        chance = min(left, reached * second.survival[place] / max(own, 1e-9))
        if chance < FAINT:
            break
        gain += chance
        until = place + 1
    return gain, until


def _may_draft(row: Row) -> bool:
    sequence = row.sequence
    request = sequence.request
    scored = request.prompt_logprobs and not sequence.produced
    return request.speculate and row.samples and not scored and _most(sequence) > 0


def _most(sequence: Sequence) -> int:
    """A step yields one token more than it drafted, and the answer may have only so many."""
    return min(MOST_DRAFTED, sequence.limit - len(sequence.tokens) - 1)


def _draw(sequence: Sequence) -> Draw:
    """The noise of the first drafted token's position."""
    return Draw(sequence.request.sampling, sequence.request.choice, len(sequence.tokens))


def _state(sequence: Sequence) -> Speculation:
    state = sequence.speculation
    if not isinstance(state, Speculation):
        state = sequence.speculation = Speculation()
    return state


def _of(tries: Many[Try], row: Row) -> Try:
    """The proposal whose beginning a row drafts."""
    return next(one for one in tries if tuple(one.tokens[: len(row.drafted)]) == row.drafted)


def make_drafting(
    config: EngineConfig, runner: Runner, scheduler: Scheduler, base: str, positions: int, wake: Callable[[], None]
) -> Drafting:
    """Everything that drafts for one engine of `positions` positions, its costs measured."""
    corpora = Corpora(native=config.native, capacity=config.suffix_tokens)
    speculators = Speculators(runner.forward, config, base, wake)
    costs = StepCosts(config.step_tokens, CONTEXTS)
    if config.speculation:
        costs.measure(rehearsal(runner, scheduler.pool, positions))
    return Drafting(corpora, speculators, costs, scheduler, active=config.speculation)
