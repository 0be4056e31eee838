"""How many drafted tokens of which rows a step verifies: as many as make the whole batch's tokens per second rise.

Candidates of all rows are taken in order of their survival probability, the surest first; within a row survival never
rises, so what is taken of a row is the beginning of its draft. (DSpark's first algorithm, with a measured cost table.)
"""

from collections.abc import Sequence as Many
from typing import NamedTuple, Protocol

from engine.scheduling.scheduler import Row
from engine.speculation.costs import StepCosts
from engine.speculation.tries import Try

# What drafting must promise over not drafting before a batch that did not draft begins to.
HYSTERESIS = 1.05


class Batch(NamedTuple):
    """A step as it is without drafts: the tokens it yields, seconds by tokens that yield one or are drafted, and room.

    Prompts that are read in the same step are left out: their tokens must be computed anyhow, and a step made long by
    them does not make a drafted token cheaper than the later step that it may save.
    """

    tokens: int
    costs: list[float]
    room: int

    @classmethod
    def of(cls, rows: Many[Row], costs: StepCosts, most: int) -> "Batch":
        """Count a step's rows, of which some sample; with drafts it may have `most` tokens."""
        sampling = [row for row in rows if row.samples]
        context = sum(row.sequence.computed for row in sampling) / len(sampling)
        table = costs.table(len(sampling), context)
        room = min(most - sum(row.length for row in rows), len(table) - 1 - len(sampling))
        return cls(len(sampling), table, room)

    @property
    def seconds_per_token(self) -> float:
        """What one more emitted token is worth."""
        return self.costs[self.tokens] / self.tokens

    @property
    def floor(self) -> float:
        """The probability below which one more token costs more than it brings; above 1 none can pay."""
        # Costs rise in steps, so look a little further than one token.
        ahead = min(4, self.room)
        if ahead <= 0:
            return 2.0
        return (self.costs[self.tokens + ahead] - self.costs[self.tokens]) / ahead / self.seconds_per_token


class Policy(Protocol):
    """Chooses among proposals. `eager` wants every drafter asked in every step, `branches` second drafts."""

    eager: bool
    branches: bool

    def select(self, tries: Many[Many[Try]], batch: Batch, *, drafting: bool) -> list[tuple[Try | None, int]]:
        """For each row the proposal to verify and how many of its tokens. `drafting`: the last step drafted."""


class Adaptive:
    """The proposal of each row that promises most, as long as the batch's rate rises."""

    eager = False
    branches = True

    def select(self, tries: Many[Many[Try]], batch: Batch, *, drafting: bool) -> list[tuple[Try | None, int]]:
        """See Policy."""
        best = [max(each, key=_promise, default=None) for each in tries]
        survivals = [[] if one is None else one.survival for one in best]
        return list(zip(best, lengths(survivals, batch, drafting=drafting), strict=True))


def lengths(survivals: Many[list[float]], batch: Batch, *, drafting: bool) -> list[int]:
    """How many drafted tokens of each row to verify.

    `survivals[i][j]` is the probability that row i's drafted tokens 0 .. j are all accepted.
    """
    base, costs = batch.tokens, batch.costs
    best = base / costs[base] * (1.0 if drafting else HYSTERESIS)
    taken, expected = 0, float(base)
    if len(survivals) == 1:
        order = [(-chance, 0, place) for place, chance in enumerate(survivals[0])]
    else:
        order = sorted(
            (-chance, row, place) for row, chances in enumerate(survivals) for place, chance in enumerate(chances)
        )
    for count, (chance, _, _) in enumerate(order[: max(0, batch.room)], start=1):
        expected -= chance
        rate = expected / costs[base + count]
        if rate > best:
            best, taken = rate, count
    chosen = [0] * len(survivals)
    for _, row, _ in order[:taken]:
        chosen[row] += 1
    return chosen


def branch_pays(gain: float, extra: int, tokens: int, expected: float, batch: Batch) -> bool:
    """Whether a second draft beside the first raises the batch's rate: `gain` tokens for `extra` computed."""
    if tokens + extra > batch.tokens + batch.room:
        return False
    return (expected + gain) / batch.costs[tokens + extra] > expected / batch.costs[tokens] * HYSTERESIS


def _promise(one: Try) -> float:
    return one.expected
