"""Sample-and-match: which drafted tokens came out. The drawn tokens are the answer whatever was drafted."""

from collections.abc import Sequence as Many
from typing import NamedTuple

from engine.layers.sampler import Sampled
from engine.scheduling.scheduler import Row


class Verified(NamedTuple):
    """A row that sampled: where its places begin among the drawn tokens, and how many of its drafted tokens came out.

    The tokens to emit are those drawn at places `first` .. `first + accepted`: what was accepted, and one more.
    """

    row: Row
    first: int
    accepted: int


def verify(rows: Many[Row], sampled: Sampled) -> list[Verified]:
    """One entry per row that samples, in order. A place behind a token that did not come out means nothing."""
    verified = []
    first = 0
    for row in rows:
        if row.samples:
            verified.append(Verified(row, first, _accepted(row.drafted, first, sampled)))
            first += 1 + len(row.drafted)
    return verified


def _accepted(drafted: tuple[int, ...], first: int, sampled: Sampled) -> int:
    """Tokens that came out. A place with a fault is not gone to: without a draft the next step may find none there."""
    for count, token in enumerate(drafted):
        if sampled.token_ids[first + count] != token or sampled.faults[first + count + 1] is not None:
            return count
    return len(drafted)
