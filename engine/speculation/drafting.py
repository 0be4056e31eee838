"""What to verify in the next step, and what became of it. Nothing here can change a token: it decides what is computed
ahead.
"""

import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch

from engine.adapters.manager import Answer
from engine.config import EngineConfig
from engine.messages import Draft
from engine.runner.runner import Runner
from engine.scheduling.scheduler import Row, Scheduler
from engine.sequence import Sequence
from engine.speculation.corpora import Corpora
from engine.speculation.costs import StepCosts
from engine.speculation.manager import Speculators
from engine.speculation.policy import Adaptive, Batch, Policy, branch_pays
from engine.speculation.proposing import FAINT, Proposing
from engine.speculation.rehearsal import rehearsal
from engine.speculation.tries import Speculation, Try, may_draft, state_of
from engine.speculation.verify import Verified

# Prompt tokens that are learnt with a response, so that its first tokens can be drafted too.
LEAD_TOKENS = 4
# A batch whose next token must be this sure to pay is full; every so many steps it is looked at all the same.
HOPELESS, PROBE_STEPS = 0.97, 64
# Where drafts do not earn what making them costs, asking pauses for 1, 2, 4 .. so many steps, or until a share of the
# rows has gone. An observation's part in what asking is believed to take for a row.
LONGEST_PAUSE, FEWER_ROWS, SMOOTH = 63, 0.75, 0.1
# What learning past responses may take of a step.
STUDY_SECONDS = 0.001
# Costs change slowly: not every step need be looked at.
LEARN_STEPS = 4


class Lesson(NamedTuple):
    """Responses that are still to be learnt, and who hears when they are."""

    namespace: str
    responses: deque[list[int]]
    answer: Answer


class Shape(NamedTuple):
    """What a step's time is learnt for: its rows without second drafts, all its tokens, the mean context.

    `generates`: every row samples. `planning` are the seconds that the drafts took before it.
    """

    rows: int
    context: float
    generates: bool
    tokens: int = 0
    planning: float = 0.0

    @classmethod
    def of(cls, rows: Many[Row]) -> "Shape":
        """Look at the rows before they are computed: afterwards some sequences have ended."""
        context = sum(row.sequence.computed for row in rows) / len(rows)
        return cls(len(rows), context, all(row.samples for row in rows))


class Pause:
    """Whether a batch is asked about at all. Making drafts takes time, which the choice among them cannot save."""

    def __init__(self) -> None:
        self._seconds_per_row = 0.0
        self._length = self._left = 0
        self._rows = 0

    def holds(self, rows: int) -> bool:
        """Whether this step, in which so many rows could be drafted for, passes without asking."""
        if rows < FEWER_ROWS * self._rows:
            self._length = self._left = 0
        self._left -= self._left > 0
        return self._left > 0

    def weigh(self, rows: int, seconds: float, expected: float, drafted: int, batch: Batch) -> None:
        """Drafts for so many rows took so long to make; `drafted` of their tokens are verified, `expected` come out."""
        self._seconds_per_row += SMOOTH * (seconds / rows - self._seconds_per_row)
        spent = self._seconds_per_row * rows
        rate = expected / (batch.costs[batch.tokens + drafted] + spent)
        if rate * batch.seconds_per_token > 1:
            self._length = self._left = self._rows = 0
        else:
            self._length = min(LONGEST_PAUSE, max(1, 2 * self._length))
            self._left, self._rows = self._length + 1, rows


class Drafting:
    """Proposes, chooses, and learns from what was verified. One engine's; knows no requests' lives."""

    def __init__(
        self, proposing: Proposing, costs: StepCosts, scheduler: Scheduler, *, policy: Policy, active: bool = True
    ) -> None:
        self.costs, self.policy = costs, policy
        self.corpora, self.speculators = proposing.corpora, proposing.speculators
        self._proposing = proposing
        self._scheduler = scheduler
        self._active = active
        self._lessons: deque[Lesson] = deque()
        self._steps = 0
        self._drafted = False
        self._pause = Pause()
        self._shape: Shape | None = None

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
        began = time.perf_counter()
        self._shape = Shape.of(rows) if self._active else None
        try:
            planned = self._plan(rows, step_tokens) if self._active else rows
        except Exception:
            # A draft is only a guess: whoever waits for an answer must not be told that guessing failed.
            traceback.print_exc(file=sys.stderr)
            planned = self._undo(rows)
        if self._shape is not None:
            tokens = sum(row.length for row in planned)
            self._shape = self._shape._replace(tokens=tokens, planning=time.perf_counter() - began)
        return planned

    def _plan(self, rows: list[Row], step_tokens: int) -> list[Row]:
        able = [index for index, row in enumerate(rows) if self._asked(row)]
        if not able:
            return rows
        batch = Batch.of(rows, self.costs, step_tokens)
        probing = self._steps % PROBE_STEPS == 0
        idle = batch.floor >= HOPELESS or self._pause.holds(len(able))
        if batch.room <= len(able) or (idle and not probing and not self.policy.eager):
            self._drafted = False
            return rows
        began = time.perf_counter()
        asking = [rows[index] for index in able]
        tries = self._proposing.ask(asking, batch.seconds_per_token, eager=self.policy.eager)
        planned = list(rows)
        self._drafted, before = False, self._drafted
        selected = self.policy.select(tries, batch, drafting=before)
        expected = batch.tokens + sum(sum(one.survival[:length]) for one, length in selected if one is not None)
        drafted = sum(length for _, length in selected)
        self._pause.weigh(len(able), time.perf_counter() - began, expected, drafted, batch)
        if probing and not any(length for _, length in selected):
            # What a step that verifies costs must be seen now and then, or it is believed dear for ever.
            selected = [(each[0], 1) if each else (None, 0) for each in tries]
        elif probing and len(able) == 1 and tries[0]:
            # So must longer drafts, where the step is not shared.
            selected = [(tries[0][0], min(batch.room, len(tries[0][0].tokens)))]
        for index, (one, length) in zip(able, selected, strict=True):
            state = state_of(rows[index].sequence)
            state.count(drafted=length > 0)
            if one is not None and length:
                state.chosen = one
                planned[index] = self._with_draft(rows[index], one.tokens[:length])
                self._drafted = True
        if self._drafted and self.policy.branches:
            planned += self._branches(planned, able, tries, batch)
        return planned

    def choose(self, verified: list[Verified]) -> list[Verified]:
        """One entry for each sequence: the draft of which more came out. Blocks of the other are let go.

        Both are verified with the same noise, so the shorter answer is the beginning of the longer one.
        """
        winners: dict[Sequence, Verified] = {}
        for each in verified:
            other = winners.get(each.row.sequence)
            if other is None or (each.accepted, each.row.branch is None) > (other.accepted, other.row.branch is None):
                winners[each.row.sequence] = each
        for each in verified:
            if each.row.drafted:
                _note(each, won=winners[each.row.sequence] is each)
        for sequence, each in winners.items():
            self._join(sequence, each)
        return list(winners.values())

    def settle(self, verified: Verified, emitted: list[int]) -> tuple[list[Draft], str]:
        """Learn from what a sequence's step revealed; its drafts, and the digest of the heads among them ("": none)."""
        sequence = verified.row.sequence
        state = sequence.speculation
        if not isinstance(state, Speculation):
            return [], ""
        self._proposing.score(state.tries, emitted)
        drafts = [_until_the_end(one, len(emitted)) for one in state.drafts]
        slot = state.slot
        state.tries, state.drafts, state.slot = [], [], 0
        for draft in drafts:
            sequence.drafted += draft.drafted
            sequence.accepted += draft.accepted if draft.won else 0
        return drafts, self.speculators.digest(slot) if slot else ""

    def remember(self, verified: list[Verified], hidden_RE: torch.Tensor) -> None:
        """Keep what heads draft from: the head's input [R, E] at the place that drew each sequence's last token."""
        if self._active:
            self._proposing.remember(verified, hidden_RE)

    def timed(self, seconds: float) -> None:
        """The planned step took so long, all in all. Steps that read prompts say nothing about generating."""
        shape = self._shape
        if shape is not None and shape.generates and self._steps % LEARN_STEPS == 0:
            self.costs.learn(shape.rows, shape.tokens, shape.context, seconds - shape.planning)

    def end(self, sequence: Sequence, *, learn: bool) -> None:
        """Let go of what a sequence holds; its answer joins its namespace's corpus."""
        state, request = sequence.speculation, sequence.request
        if learn and self._active and sequence.learns and sequence.produced > 1:
            self.corpora.learn(request.namespace, sequence.tokens[-(sequence.produced + LEAD_TOKENS) :])
        if isinstance(state, Speculation):
            if state.memory is not None:
                state.memory.close()
            self._scheduler.prune(state.branch)
            sequence.speculation = None
        self._proposing.drop(sequence)

    def forget(self, namespace: str) -> None:
        """Drop what was learnt of a namespace, and what still was to be."""
        self._proposing.forget(namespace)
        for lesson in self._lessons:
            if lesson.namespace == namespace:
                lesson.responses.clear()

    def _undo(self, rows: list[Row]) -> list[Row]:
        """The step without drafts, whatever was prepared for some."""
        for row in rows:
            state = row.sequence.speculation
            if isinstance(state, Speculation):
                self._scheduler.prune(state.branch)
                state.branch, state.tries = None, []
        self._scheduler.copies = []
        self._drafted = False
        return rows

    def _asked(self, row: Row) -> bool:
        """Whether the drafters are asked about this row in this step."""
        return may_draft(row) and (self.policy.eager or not state_of(row.sequence).rests())

    def _with_draft(self, row: Row, tokens: list[int]) -> Row:
        """The row with as many of these tokens behind it as there are blocks for."""
        fits = self._scheduler.stretch(row.sequence, len(tokens))
        if fits <= 0:
            return row
        return row._replace(length=row.length + fits, drafted=tuple(tokens[:fits]))

    def _branches(self, planned: list[Row], able: list[int], tries: list[list[Try]], batch: Batch) -> list[Row]:
        """Second drafts, verified beside the first where that raises the rate: both share the noise, and the prefix."""
        tokens = batch.tokens + sum(len(row.drafted) for row in planned)
        expected = batch.tokens + sum(
            sum(chosen.survival[: len(planned[index].drafted)])
            for index in able
            if planned[index].drafted and (chosen := state_of(planned[index].sequence).chosen) is not None
        )
        branches = []
        for index, each in zip(able, tries, strict=True):
            row = planned[index]
            if len(each) < 2 or not row.drafted or row.length != 1 + len(row.drafted):
                continue
            state = state_of(row.sequence)
            first = state.chosen
            second = each[1] if first is each[0] else each[0]
            assert first is not None, "a drafted row has its proposal"
            gain, length = second_gain(first, second, len(row.drafted))
            if length and branch_pays(gain, 1 + length, tokens, expected, batch):
                branch = self._scheduler.fork(row.sequence, 1 + length)
                if branch is None:
                    continue
                state.branch, state.second = branch, second
                branches.append(Row(row.sequence, 1 + length, tuple(second.tokens[:length]), branch.table))
                tokens, expected = tokens + 1 + length, expected + gain
        return branches

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


def second_gain(first: Try, second: Try, length: int) -> tuple[float, int]:
    """What a second draft adds to `length` tokens of the first, and how long it should be; nothing while they agree.

    It helps only where the first has failed: its chance there is taken of what the first leaves.
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
        chance = left * second.survival[place] / max(own, 1e-9)
        if chance < FAINT:
            break
        gain += chance
        until = place + 1
    return gain, until


def _until_the_end(draft: Draft, emitted: int) -> Draft:
    """What stands behind a token that ended the answer was not said; a step that goes on says one token more."""
    if draft.accepted < emitted:
        return draft
    return Draft(draft.drafter, draft.drafted, emitted, draft.won, ended=True)


def _note(verified: Verified, *, won: bool) -> None:
    """Keep what is to be reported of a verified draft."""
    state = state_of(verified.row.sequence)
    one = state.chosen if verified.row.branch is None else state.second
    assert one is not None, "a drafted row has its proposal"
    state.drafts.append(Draft(one.drafter, len(verified.row.drafted), verified.accepted, won))
    state.slot = state.slot or one.slot


def make_drafting(
    config: EngineConfig, runner: Runner, scheduler: Scheduler, base: str, positions: int, wake: Callable[[], None]
) -> Drafting:
    """Everything that drafts for one engine of `positions` positions, its costs measured."""
    corpora = Corpora(native=config.native, capacity=config.suffix_tokens)
    proposing = Proposing(corpora, Speculators(runner.forward, config, base, wake))
    costs = StepCosts(config.step_tokens)
    if config.speculation:
        costs.measure(rehearsal(runner, scheduler.pool, positions))
    return Drafting(proposing, costs, scheduler, policy=Adaptive(), active=config.speculation)
