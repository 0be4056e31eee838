"""Which logged requests heads are trained on, and which of them are kept to judge by. Pure functions."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

HELD_OUT = 0.1
# Two thirds of it is what the gate needs to judge (worker/gate/speculator.py).
LEAST_HELD_OUT = 30
# So few requests leave a judged part that is large enough, so each costs such a share of the budget at most.
ENOUGH = 2 * LEAST_HELD_OUT


class Split(NamedTuple):
    """Indices, oldest first: what is trained on, what tells when to stop, and what the gate judges by."""

    train: list[int]
    stop: list[int]
    judge: list[int]


def choose(sizes: Sequence[int], budget: int, seed: int) -> list[int]:
    """Indices of requests (oldest first) worth `budget` tokens: half the newest, half a uniform draw from the rest.
    `sizes` are what `costs` makes of their tokens.

    The newest alone would forget what comes once a month, the draw alone would learn last month's traffic.
    """
    if sum(sizes) <= budget:
        return list(range(len(sizes)))
    newest = _fill(range(len(sizes) - 1, -1, -1), sizes, budget // 2)
    older = range(len(sizes) - len(newest))
    drawn = _fill(sorted(older, key=lambda index: _lot(seed, index)), sizes, budget - budget // 2)
    return sorted([*newest, *drawn])


def costs(sizes: Sequence[int], budget: int) -> list[int]:
    """What requests of so many tokens count for: however long prompts are, ENOUGH of them come within the budget."""
    return [min(size, budget // ENOUGH) for size in sizes]


def split(count: int) -> Split:
    """The newest tenth is held out; of it every third request tells when to stop, the others are the gate's alone."""
    held = min(max(round(HELD_OUT * count), LEAST_HELD_OUT), count // 2)
    first = count - held
    kept = range(first, count)
    return Split(list(range(first)), [i for i in kept if i % 3 == 0], [i for i in kept if i % 3])


def _fill(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[int]:
    taken = []
    for index in order:
        if sizes[index] > budget:
            break
        taken.append(index)
        budget -= sizes[index]
    return taken


def _lot(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()
