"""A draft for one row, and what a sequence keeps for its drafts."""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.layers.sampler import Draw
from engine.messages import Draft, Drafter
from engine.scheduling.scheduler import Branch, Row
from engine.sequence import Sequence
from engine.speculation.acceptance import Counts
from engine.speculation.corpora import Memory

MOST_DRAFTED = 16
# Proposals in a row that may be worth nothing before fewer are asked for, down to one in so many steps.
PATIENCE, LONGEST_REST = 4, 15


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
    """What a sequence keeps for its drafts: `fed` of its tokens are in its memory; `tries` are this step's, of which
    `chosen` is verified, and `second` beside it in `branch`."""

    memory: Memory | None = None
    fed: int = 0
    tries: list[Try] = field(default_factory=list)
    chosen: Try | None = None
    second: Try | None = None
    branch: Branch | None = None
    # Proposals in a row of which nothing was verified, and how many steps are not asked about because of that.
    misses: int = 0
    rest: int = 0
    # Drafts that the last step verified, and the slot of the heads among them, to be reported.
    drafts: list[Draft] = field(default_factory=list)
    slot: int = 0

    def rests(self) -> bool:
        """Whether this step passes without asking: text that was not foreseen for long rarely is in the next step."""
        self.rest -= 1
        return self.rest >= 0

    def count(self, *, drafted: bool) -> None:
        """A proposal was asked for, and something of it verified or not."""
        self.misses = 0 if drafted else self.misses + 1
        self.rest = 0 if self.misses < PATIENCE else min(LONGEST_REST, 1 << (self.misses - PATIENCE))


def state_of(sequence: Sequence) -> Speculation:
    """A sequence's state, made when it is first needed."""
    state = sequence.speculation
    if not isinstance(state, Speculation):
        state = sequence.speculation = Speculation()
    return state


def may_draft(row: Row) -> bool:
    """Whether tokens may be drafted behind this row."""
    sequence = row.sequence
    request = sequence.request
    scored = request.prompt_logprobs and not sequence.produced
    return request.speculate and row.samples and not scored and most_drafted(sequence) > 0


def most_drafted(sequence: Sequence) -> int:
    """A step yields one token more than it drafted, and the answer may have only so many."""
    return min(MOST_DRAFTED, sequence.limit - len(sequence.tokens) - 1)


def next_draw(sequence: Sequence) -> Draw:
    """The noise of the first drafted token's position."""
    return Draw(sequence.request.sampling, sequence.request.choice, len(sequence.tokens))
