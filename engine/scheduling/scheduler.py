"""Who computes how many tokens in the next step. There are no phases: a row is any number of tokens.

Running sequences come first, those with one token to go before those still reading their prompt; then waiting ones,
interactive before batch, oldest first. When blocks run out the least deserving running sequence is preempted: its
blocks are freed and its tokens recomputed later, with the same result, since sampling noise depends on positions only.
"""

from bisect import insort
from typing import NamedTuple

import numpy as np

from engine.memory.blocks import BlockPool
from engine.sequence import Sequence

# Tokens every running sequence may still add before a newcomer's blocks could be wanted back.
GROWTH_TOKENS = 16


class Row(NamedTuple):
    """`length` tokens of a sequence, starting with the first that is not cached."""

    sequence: Sequence
    length: int

    @property
    def samples(self) -> bool:
        """Whether this row reaches the sequence's last token, so that the next one is drawn."""
        return self.length == self.sequence.missing


class Scheduler:
    """Owns the waiting and running lists and every sequence's blocks."""

    def __init__(self, pool: BlockPool, *, max_running: int, step_tokens: int, max_context: int) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._max_blocks = pool.needed(max_context)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind its betters."""
        insort(self.waiting, sequence, key=lambda other: other.rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and free its blocks."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._free(sequence)

    def schedule(self) -> list[Row]:
        """Rows of the next step; empty when there is nothing to do."""
        self._grow()
        self._admit()
        rows: list[Row] = []
        budget = self._step_tokens
        for sequence in sorted(self.running, key=lambda other: (other.missing > 1, other.rank)):
            length = min(sequence.missing, budget)
            if length:
                rows.append(Row(sequence, length))
                budget -= length
        return rows

    def _grow(self) -> None:
        """Give every running sequence the block its next token needs, taking from the least deserving if need be."""
        for sequence in sorted(self.running, key=lambda other: other.rank):
            while sequence.table is not None and self.pool.needed(len(sequence.tokens)) > len(sequence.blocks):
                if self.pool.free:
                    self._give(sequence, 1)
                else:
                    self._preempt(max(self.running, key=lambda other: other.rank))

    def _admit(self) -> None:
        """Move waiting sequences to running while they fit, with all blocks of the tokens they bring."""
        while self.waiting:
            head = self.waiting[0]
            while not self._fits(head):
                victim = max(self.running, key=lambda other: other.rank)
                if victim.rank[0] <= head.rank[0]:
                    return
                self._preempt(victim)
            self.waiting.remove(head)
            self.running.append(head)
            head.table = np.zeros(self._max_blocks, dtype=np.int64)
            self._give(head, self.pool.needed(len(head.tokens)))

    def _fits(self, sequence: Sequence) -> bool:
        """Some room to grow is kept for those running, or the newcomer would be preempted at the next boundary."""
        if not self.running:
            return True
        reserve = self.pool.needed(GROWTH_TOKENS * len(self.running))
        room = self.pool.free >= self.pool.needed(len(sequence.tokens)) + reserve
        return room and len(self.running) < self._max_running

    def _give(self, sequence: Sequence, count: int) -> None:
        assert sequence.table is not None, "blocks are for running sequences"
        held = len(sequence.blocks)
        taken = self.pool.take(count)
        sequence.blocks += taken
        sequence.table[held : held + count] = taken

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        sequence.preemptions += 1
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.table = None
        sequence.computed = 0
