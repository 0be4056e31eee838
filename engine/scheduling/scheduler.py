"""Who computes how many tokens in the next step. There are no phases: a row is any number of tokens.

Running sequences come first, those with one token to go before those still reading their prompt; then waiting ones in
the queue's order. When blocks run out the least deserving running sequence is preempted: its blocks are let go and its
tokens recomputed later (or found again in the prefix cache), with the same result, since noise depends on positions
only.
"""

import time
from bisect import insort
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.memory.blocks import NULL_BLOCK, BlockPool
from engine.memory.prefix import Node, PrefixCache
from engine.scheduling.queue import Queue
from engine.sequence import Sequence, by_rank

# Tokens every running sequence may still add before a newcomer's blocks could be wanted back.
GROWTH_TOKENS = 16
# Waiting sequences looked at in one step that wait for blocks another is about to compute.
MOST_HELD = 32


class Row(NamedTuple):
    """`length` tokens of a sequence, starting with the first that is not cached; the last of them may be `drafted`.

    `branch` holds the blocks of a second draft of the same sequence, in place of its own table.
    """

    sequence: Sequence
    length: int
    drafted: tuple[int, ...] = ()
    branch: NDArray[np.int64] | None = None

    @property
    def samples(self) -> bool:
        """Whether this row reaches the sequence's last token, so that the next one is drawn."""
        sequence = self.sequence
        return self.length - len(self.drafted) == len(sequence.tokens) - sequence.computed and sequence.pool is None

    @property
    def tokens(self) -> list[int]:
        """What is computed, in order."""
        start = self.sequence.computed
        return [*self.sequence.tokens[start : start + self.length], *self.drafted]

    @property
    def table(self) -> NDArray[np.int64]:
        """Block numbers by position."""
        table = self.sequence.table if self.branch is None else self.branch
        assert table is not None, "scheduled sequences hold blocks"
        return table


class Branch(NamedTuple):
    """Blocks of a sequence's second draft: its table, and the fresh blocks that stand in it from index `first` on."""

    table: NDArray[np.int64]
    blocks: list[int]
    first: int


class Scheduler:
    """Owns the waiting and running lists and every sequence's blocks. `running` has the most deserving first."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        step_tokens: int,
        max_context: int,
        prefix: PrefixCache | None = None,
    ) -> None:
        self.pool = pool
        self.prefix = prefix
        self.waiting = Queue()
        self.running: list[Sequence] = []
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._max_blocks = pool.needed(max_context)
        # Blocks handed out since they were last cleared: they may hold what somebody else left, NaN included.
        self.fresh: list[int] = []
        # Blocks to copy, from and to, before the next step.
        self.copies: list[tuple[int, int]] = []
        # Blocks that running sequences are about to compute: who wants the same ones waits for them.
        self._promised: dict[int, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind its betters."""
        if self.prefix is not None:
            request = sequence.request
            sequence.root = self.prefix.open(request.adapter, request.cache_salt, request.namespace)
        self.waiting.enter(sequence)
        sequence.queued = True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and let go of its blocks. One that was never added is nothing to forget."""
        if not sequence.queued:
            return
        sequence.queued = False
        if sequence.table is not None:
            self.running.remove(sequence)
            self._free(sequence)
        else:
            self.waiting.take(sequence)
        self.waiting.leave(sequence)
        if self.prefix is not None and sequence.root is not None:
            self.prefix.close(sequence.root)

    def schedule(self) -> list[Row]:
        """Rows of the next step; empty when there is nothing to do."""
        self._grow()
        if self.waiting:
            self._admit()
        rows: list[Row] = []
        reading: list[Sequence] = []
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed == 1:
                rows.append(Row(sequence, 1))
            else:
                reading.append(sequence)
        del rows[self._step_tokens :]
        budget = self._step_tokens - len(rows)
        for sequence in reading:
            if not budget:
                break
            length = min(sequence.missing, budget)
            rows.append(Row(sequence, length))
            budget -= length
        return rows

    def stretch(self, sequence: Sequence, drafted: int) -> int:
        """How many drafted tokens have room behind a running sequence's own; takes free blocks, never others'."""
        size = self.pool.block_size
        wanted = self.pool.needed(len(sequence.tokens) + drafted) - len(sequence.blocks)
        # Everybody running may want a block for its next token, which goes before anybody's draft.
        wanted = min(wanted, max(0, self.pool.free - len(self.running)))
        if wanted > 0:
            self._give(sequence, self._take(wanted))
        return min(drafted, len(sequence.blocks) * size - len(sequence.tokens))

    def fork(self, sequence: Sequence, length: int) -> Branch | None:
        """Blocks for `length` tokens computed beside a running sequence's own; None when there are none to spare.

        The first begins as a copy of the sequence's last block, where that is partly filled.
        """
        assert sequence.table is not None, "only running sequences draft"
        size = self.pool.block_size
        first = sequence.computed // size
        count = self.pool.needed(sequence.computed + length) - first
        if count > self.pool.free - len(self.running) or first + count > len(sequence.table):
            return None
        table = sequence.table.copy()
        blocks = self._take(count)
        table[first : first + count] = blocks
        if sequence.computed % size:
            self.copies.append((sequence.blocks[first], blocks[0]))
        return Branch(table, blocks, first)

    def adopt(self, sequence: Sequence, branch: Branch) -> None:
        """Go on with a branch: its blocks take the place of the sequence's own."""
        self._shorten(sequence, branch.first)
        self._give(sequence, branch.blocks)

    def prune(self, branch: Branch | None) -> None:
        """Let go of a branch that nobody goes on with."""
        if branch is not None:
            self.pool.give_back(branch.blocks)

    def advance(self, rows: Rows[Row]) -> None:
        """The rows were computed: their keys and values are in place, and full blocks can be found by others.

        Drafted tokens are not counted: `keep` does that for those that were accepted.
        """
        for sequence, length, drafted, branch in rows:
            if branch is None:
                self.keep(sequence, length - len(drafted))

    def keep(self, sequence: Sequence, count: int) -> None:
        """The next `count` of a sequence's tokens have their keys and values in place."""
        sequence.computed += count
        if sequence.root is not None and sequence.computed >= (sequence.chained + 1) * self.pool.block_size:
            self._chain(sequence)

    def distrust(self, sequence: Sequence) -> None:
        """Let nobody find what this sequence may have computed: its numbers turned out not to be finite."""
        if self.prefix is not None and sequence.root is not None:
            self.prefix.drop(sequence.root)

    def _grow(self) -> None:
        """Give every running sequence the block its next token needs, taking from the least deserving if need be."""
        size = self.pool.block_size
        short = [each for each in self.running if len(each.tokens) > len(each.blocks) * size]
        for sequence in short:
            while sequence.table is not None and len(sequence.tokens) > len(sequence.blocks) * size:
                if self.pool.free or self._reclaim():
                    self._give(sequence, self._take(1))
                else:
                    self._preempt(self.running[-1])

    def _admit(self) -> None:
        """Move waiting sequences to running while they fit, with all blocks of the tokens they bring."""
        held: set[Sequence] = set()
        while len(self.running) < self._max_running or self.running[-1].rank[0]:
            head = self.waiting.head(held)
            if head is None:
                return
            found = self._find(head)
            if self._is_promised(head, found):
                held.add(head)
                if len(held) == MOST_HELD:
                    return
                continue
            fits = self._fits(head, found) or (self._reclaim() and self._fits(head, found))
            if not fits and not self._make_room(head, found):
                return
            self._begin(head, found)

    def _make_room(self, head: Sequence, found: list[Node]) -> bool:
        """Preempt sequences of a lower priority until the head fits; nobody when even all of them would not do."""
        outranked = [each for each in self.running if each.rank[0] > head.rank[0]]
        # A block of theirs that another holds too will not be freed; then the head waits after all, for a step or two.
        freed = sum(self.pool.references[block] == 1 for each in outranked for block in each.blocks)
        left = len(self.running) - len(outranked)
        if left and (left >= self._max_running or self._wanted(head, found, left) > self.pool.free + freed):
            return False
        while outranked:
            self._preempt(outranked.pop())
            if self._fits(head, found):
                return True
        return False

    def _fits(self, sequence: Sequence, found: list[Node]) -> bool:
        """Some room to grow is kept for those running, or the newcomer would be preempted at the next boundary."""
        running = len(self.running)
        return not running or (running < self._max_running and self._wanted(sequence, found, running) <= self.pool.free)

    def _wanted(self, sequence: Sequence, found: list[Node], running: int) -> int:
        """Free blocks it takes to begin this sequence beside so many: idle ones that it finds again are free, too."""
        held = sum(self.pool.references[node.block] > 0 for node in found)
        return self.pool.needed(len(sequence.tokens)) - held + self.pool.needed(GROWTH_TOKENS * running)

    def _begin(self, sequence: Sequence, found: list[Node]) -> None:
        self.waiting.take(sequence)
        insort(self.running, sequence, key=by_rank)
        sequence.table = np.zeros(self._max_blocks, dtype=np.int64)
        size = self.pool.block_size
        for node in found:
            self.pool.share(node.block)
        self._give(sequence, [node.block for node in found])
        self._give(sequence, self._take(self.pool.needed(len(sequence.tokens)) - len(found)))
        sequence.computed = len(found) * size
        sequence.chained = len(found)
        sequence.tip = found[-1] if found else sequence.root
        self._promise(sequence)
        if sequence.started is None:
            sequence.started = time.perf_counter()
            sequence.cached_tokens = sequence.computed
            self.waiting.charge(sequence, sequence.missing)

    def _reclaim(self) -> bool:
        """Take back what running sequences took for drafts that did not come; whether anything was."""
        before = self.pool.free
        for sequence in self.running:
            self._shorten(sequence, self.pool.needed(len(sequence.tokens)))
        return self.pool.free > before

    def _shorten(self, sequence: Sequence, count: int) -> None:
        """Keep the first `count` blocks. The table forgets the others: what they will hold next is not to be read."""
        assert sequence.table is not None, "only running sequences hold blocks"
        if len(sequence.blocks) > count:
            self.pool.give_back(sequence.blocks[count:])
            del sequence.blocks[count:]
            sequence.table[count:] = NULL_BLOCK

    def _take(self, count: int) -> list[int]:
        taken = self.pool.take(count)
        self.fresh += taken
        return taken

    def _give(self, sequence: Sequence, blocks: list[int]) -> None:
        assert sequence.table is not None, "blocks are for running sequences"
        held = len(sequence.blocks)
        sequence.blocks += blocks
        sequence.table[held : held + len(blocks)] = blocks

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        sequence.preemptions += 1
        self.waiting.interrupt(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._withdraw(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.table = None
        sequence.tip = None
        sequence.computed = sequence.chained = 0

    def _find(self, sequence: Sequence) -> list[Node]:
        """Cached blocks this sequence may begin with."""
        if self.prefix is None or sequence.root is None or not sequence.reuses or sequence.root.dropped:
            return []
        return self.prefix.find(sequence.root, sequence.tokens)

    def _is_promised(self, sequence: Sequence, found: list[Node]) -> bool:
        """Whether a running sequence is about to compute the next block this one would compute."""
        if not self._promised or sequence.root is None or not sequence.reuses:
            return False
        size = self.pool.block_size
        start = len(found) * size
        if len(sequence.tokens) - 1 < start + size or self.prefix is None:
            return False
        before = found[-1] if found else sequence.root
        promiser = self._promised.get(self.prefix.keys(before, sequence.tokens[: start + size], start)[0])
        # Waiting for one of a lower priority would hand that priority on.
        return promiser is not None and promiser.rank[0] <= sequence.rank[0]

    def _promise(self, sequence: Sequence) -> None:
        """Say which blocks this sequence is about to compute, unless another has said so already."""
        if self.prefix is None or sequence.tip is None or sequence.missing == 1:
            return
        keys = self.prefix.keys(sequence.tip, sequence.tokens, sequence.computed)
        # Equal hashes are rare but legal, within one text too.
        sequence.promises = [key for key in dict.fromkeys(keys) if self._promised.setdefault(key, sequence) is sequence]

    def _withdraw(self, sequence: Sequence) -> None:
        for key in sequence.promises:
            del self._promised[key]
        sequence.promises = []

    def _chain(self, sequence: Sequence) -> None:
        """Keep the blocks a sequence has filled. Where another was first its blocks are taken, and these let go."""
        assert self.prefix is not None
        assert sequence.root is not None
        size = self.pool.block_size
        while (sequence.chained + 1) * size <= sequence.computed and sequence.tip is not None:
            index = sequence.chained
            tokens = sequence.tokens[index * size : (index + 1) * size]
            node = self.prefix.add(sequence.root, sequence.tip, tokens, sequence.blocks[index])
            sequence.tip = node
            if node is None:
                self._withdraw(sequence)
                return
            sequence.chained += 1
            if node.block != sequence.blocks[index]:
                self._replace(sequence, index, node.block)
            if sequence.promises and sequence.promises[0] == node.key:
                del self._promised[sequence.promises.pop(0)]

    def _replace(self, sequence: Sequence, index: int, block: int) -> None:
        """Read an equal block that is cached instead of one's own."""
        assert sequence.table is not None, "only running sequences hold blocks"
        self.pool.share(block)
        self.pool.give_back([sequence.blocks[index]])
        sequence.blocks[index] = block
        sequence.table[index] = block
