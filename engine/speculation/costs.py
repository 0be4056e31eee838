"""What a step costs: milliseconds by its tokens and the context behind them, measured at start and kept up to date.

Tokens that a step verifies are nearly free on hardware that waits for memory and dear on hardware that waits for
arithmetic: where the line runs is measured, not assumed.
"""

import time
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise

from engine.messages import StepCost

# Share of a new observation, and how far from what was expected it may lie: beyond that the machine did other work.
WEIGHT, ODD = 0.05, 4.0
REFRESH_STEPS = 64
REPEATS = 3
# Start-up must not wait for a large model's largest steps: the rest is extrapolated.
MEASURE_SECONDS = 0.5

Measure = Callable[[int, int], None]


class StepCosts:
    """Seconds of steps of 1 .. `most` tokens at a few lengths of context; monotone in tokens, linear between points."""

    def __init__(self, most: int, contexts: list[int]) -> None:
        self._most = most
        self._sizes = [size for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if size < most]
        self._sizes.append(most)
        self._contexts = contexts
        self._points = [[1e-3 * (1 + size / 16) for size in self._sizes] for _ in contexts]
        self._tables: list[list[float]] = []
        self._seen = 0
        self._refresh()

    def measure(self, run: Measure, seconds: float = MEASURE_SECONDS) -> None:
        """Time `run(tokens, context)` at every point, cheapest first, for about so long; the rest follows the slope."""
        began = time.perf_counter()
        known = [0] * len(self._contexts)
        for column, size in enumerate(self._sizes):
            for line, context in enumerate(self._contexts):
                if known[line] == column and time.perf_counter() - began < seconds:
                    self._points[line][column] = min(_timed(run, size, context) for _ in range(REPEATS))
                    known[line] += 1
        for line, count in enumerate(known):
            self._extrapolate(line, max(count, 1), known)
        self._refresh()

    def table(self, context: float) -> list[float]:
        """Seconds by number of tokens, for rows with about so much context; entry 0 is that of one token."""
        return self._tables[min(bisect_left(self._contexts, context), len(self._contexts) - 1)]

    def learn(self, tokens: int, context: float, seconds: float) -> None:
        """A real step of this size took so long."""
        if tokens > self._most:
            return
        line = min(bisect_left(self._contexts, context), len(self._contexts) - 1)
        ratio = min(max(seconds / self._tables[line][tokens], 1 / ODD), ODD)
        right = bisect_left(self._sizes, tokens)
        points = self._points[line]
        for column, size in ((right, self._sizes[right]), (right - 1, self._sizes[right - 1])):
            # The nearer point learns more.
            near = 1.0 - min(1.0, abs(size - tokens) / max(1, self._sizes[right] - self._sizes[right - 1]))
            if column >= 0 and (near or size == tokens):
                points[column] *= 1 + WEIGHT * near * (ratio - 1)
        self._seen += 1
        if self._seen % REFRESH_STEPS == 0:
            self._refresh()

    def report(self) -> list[StepCost]:
        """The points, for people to read."""
        return [
            StepCost(tokens=size, context=context, milliseconds=round(1000 * seconds, 4))
            for context, points in zip(self._contexts, self._points, strict=True)
            for size, seconds in zip(self._sizes, points, strict=True)
        ]

    def _extrapolate(self, line: int, known: int, all_known: list[int]) -> None:
        """Points that were too dear to measure: those of another context if it got further, else the last slope."""
        points = self._points[line]
        further = next((other for other, count in enumerate(all_known) if count > known), None)
        for column in range(known, len(points)):
            if further is not None and column < all_known[further]:
                points[column] = points[column - 1] + self._points[further][column] - self._points[further][column - 1]
                continue
            last, before = (column - 1, column - 2) if column > 1 else (0, 0)
            rise = points[last] - points[before]
            run = self._sizes[last] - self._sizes[before]
            slope = rise / run if run else points[0] / 16
            points[column] = points[column - 1] + max(0.0, slope) * (self._sizes[column] - self._sizes[column - 1])

    def _refresh(self) -> None:
        self._tables = [self._dense(points) for points in self._points]

    def _dense(self, points: list[float]) -> list[float]:
        """Entry by number of tokens (entry 0 repeats that of 1), never falling."""
        rising: list[float] = []
        for seconds in points:
            rising.append(max(seconds, rising[-1]) if rising else seconds)
        dense = [rising[0]] * 2
        for (size, low), (upper, high) in pairwise(zip(self._sizes, rising, strict=True)):
            dense += [low + (high - low) * (at - size) / (upper - size) for at in range(size + 1, upper + 1)]
        return dense


def _timed(run: Measure, tokens: int, context: int) -> float:
    began = time.perf_counter()
    run(tokens, context)
    return time.perf_counter() - began
