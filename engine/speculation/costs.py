"""What a step costs: milliseconds by its rows, its tokens and the context behind them.

Tokens that a step verifies are nearly free on hardware that waits for memory and dear on hardware that waits for
arithmetic: where the line runs is measured at start and corrected by every real step, not assumed.
"""

import time
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise

from engine.messages import StepCost

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Costs are told apart by the rows of a step and by the mean context behind them. Each number of rows comes with the
# fewest that are nearer to it than to another: its line's first size.
ROWS, CONTEXTS = {1: 1, 4: 2, 16: 6, 64: 24}, (128, 768)
# Share of a new observation: in the whole line, because the machine became slower or faster, and more in the nearest
# points. Sizes that are never seen must move along, or drafting would look dear after a slow start and never be tried.
# One that is further off than ODD times what was expected says something about the machine's other work.
WHOLE, NEAR, ODD = 0.05, 0.02, 3.0
REFRESH_STEPS = 32
REPEATS = 2
# Start-up must not wait for a large model's largest steps: the rest is extrapolated.
MEASURE_SECONDS = 0.8
# What a step costs beyond the forward and the sampler, until real steps tell.
OVERHEAD_SECONDS = 1e-4

Measure = Callable[[int, int, int], None]


class Line:
    """Seconds of steps with about so many rows and so much context, by tokens: measured points, linear between."""

    def __init__(self, rows: int, context: int, most: int) -> None:
        self.rows, self.context, self._most = rows, context, most
        self.sizes = [size for size in SIZES if ROWS[rows] <= size < most] + [most]
        self.points = [1e-3 * (1 + size / 16) for size in self.sizes]
        self.known = 0
        self.table: list[float] = []
        self._seen = 0
        self.refresh()

    def measured(self, seconds: float) -> None:
        """The next point."""
        self.points[self.known] = seconds + OVERHEAD_SECONDS
        self.known += 1

    def extrapolate(self, like: "Line | None") -> None:
        """Points that were too dear to measure: another line's rises if it got further, else the last slope."""
        if not self.known and like is not None:
            self.points[0] = like.cost(self.sizes[0])
        for column in range(max(1, self.known), len(self.points)):
            size, before = self.sizes[column], self.sizes[column - 1]
            other = like.sizes.index(size) if like is not None and size in like.sizes else 0
            if like is not None and 0 < other < like.known:
                rise = like.points[other] - like.points[other - 1]
            else:
                start = max(0, column - 2)
                run = self.sizes[column - 1] - self.sizes[start]
                slope = (self.points[column - 1] - self.points[start]) / run if run else self.points[0] / 16
                rise = max(0.0, slope) * (size - before)
            self.points[column] = self.points[column - 1] + rise
        self.refresh()

    def learn(self, tokens: int, seconds: float) -> None:
        """A real step of this size took so long."""
        # Against the points themselves: the table is older, and a loop that answers late swings.
        step = min(max(seconds / self.cost(tokens), 1 / ODD), ODD) - 1
        left, right, share = self._between(tokens)
        near = {left: 1 - share, right: share} if left != right else {left: 1.0}
        for column in range(len(self.points)):
            self.points[column] *= 1 + (WHOLE + NEAR * near.get(column, 0.0)) * step
        self._seen += 1
        if self._seen % REFRESH_STEPS == 0:
            self.refresh()

    def cost(self, tokens: int) -> float:
        """Seconds by the points as they are now."""
        left, right, share = self._between(tokens)
        return self.points[left] * (1 - share) + self.points[right] * share

    def _between(self, tokens: int) -> tuple[int, int, float]:
        """The points around a size, and how far it is from the left one towards the right one."""
        right = min(bisect_left(self.sizes, tokens), len(self.sizes) - 1)
        left = max(0, right - 1)
        if tokens >= self.sizes[right] or right == left:
            return right, right, 0.0
        return left, right, (tokens - self.sizes[left]) / (self.sizes[right] - self.sizes[left])

    def refresh(self) -> None:
        """Entry by number of tokens, never falling; those below the first point repeat it.

        A point above a later one was disturbed when it was measured: other work makes steps slower, never faster.
        """
        rising = list(self.points)
        for column in range(len(rising) - 2, -1, -1):
            rising[column] = min(rising[column], rising[column + 1])
        dense = [rising[0]] * (self.sizes[0] + 1)
        for (size, low), (upper, high) in pairwise(zip(self.sizes, rising, strict=True)):
            dense += [low + (high - low) * (at - size) / (upper - size) for at in range(size + 1, upper + 1)]
        self.table = dense


class StepCosts:
    """Seconds of steps of 1 .. `most` tokens."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines = [Line(rows, context, most) for rows in ROWS for context in CONTEXTS]

    def measure(self, run: Measure, seconds: float = MEASURE_SECONDS) -> None:
        """Time `run(rows, tokens, context)` at every point, small steps first, for about so long."""
        run(1, 1, CONTEXTS[0])
        began = time.perf_counter()
        for size in [*SIZES, self._most]:
            for line in self._lines:
                due = line.known < len(line.sizes) and line.sizes[line.known] == size
                if due and time.perf_counter() - began < seconds:
                    line.measured(min(_timed(run, line, size) for _ in range(REPEATS)))
        furthest = max(self._lines, key=lambda line: line.sizes[line.known - 1] if line.known else 0)
        for line in self._lines:
            line.extrapolate(furthest if line is not furthest else None)

    def table(self, rows: int, context: float) -> list[float]:
        """Seconds by number of tokens, for steps with about so many rows and so much context."""
        return self._line(rows, context).table

    def learn(self, rows: int, tokens: int, context: float, seconds: float) -> None:
        """A real step took so long."""
        if tokens <= self._most:
            self._line(rows, context).learn(tokens, seconds)

    def report(self) -> list[StepCost]:
        """The points, for people to read."""
        return [
            StepCost(rows=line.rows, tokens=size, context=line.context, milliseconds=round(1000 * seconds, 4))
            for line in self._lines
            for size, seconds in zip(line.sizes, line.points, strict=True)
        ]

    def _line(self, rows: int, context: float) -> Line:
        """The line of the nearest rows, and of a context that is at most twice its own."""
        row = max(at for at, fewest in enumerate(ROWS.values()) if fewest <= max(1, rows))
        column = min(bisect_left(CONTEXTS, context / 2), len(CONTEXTS) - 1)
        return self._lines[row * len(CONTEXTS) + column]


def _timed(run: Measure, line: Line, tokens: int) -> float:
    began = time.perf_counter()
    run(line.rows, tokens, line.context)
    return time.perf_counter() - began
