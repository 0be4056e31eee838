"""Who holds which KV block. Block 0 is the null block: padding reads and writes it, nobody owns it.

Blocks are shared by counting references. A block that is kept (the prefix cache wants it) goes, when its last holder
lets go, to the end of an idle line instead of the free list; it is evicted from the front when blocks are wanted.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

NULL_BLOCK = 0


class OutOfBlocks(RuntimeError):
    """The pool cannot give that many blocks: preempt somebody or wait."""


class BlockPool:
    """The blocks of the KV cache, each `block_size` tokens. Only the scheduler and the prefix cache take and return."""

    def __init__(self, tokens: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = tokens // block_size
        self.references = [0] * (self.total + 1)
        # Told that an idle block was taken away, before it is handed out.
        self.evicted: Callable[[int], None] = lambda _: None
        self._free = list(range(self.total, NULL_BLOCK, -1))
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks nobody holds, idle ones included."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` blocks, all or none, with one reference each. Raises OutOfBlocks."""
        if count > self.free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.free} free")
        while len(self._free) < count:
            self._evict()
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.references[block] = 1
        return taken

    def share(self, block: int) -> None:
        """Refer once more to a block that is held or idle."""
        if not self.references[block]:
            assert block in self._idle, f"block {block} is free and holds nothing"
            del self._idle[block]
        self.references[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """Drop one reference each, last block first: what begins a text stays idle longest. Twice is our bug."""
        for block in reversed(blocks):
            assert self.references[block] > 0, f"block {block} was returned twice"
            self.references[block] -= 1
            if not self.references[block]:
                if block in self._kept:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """Leave a held block's content alone when its last holder lets go, until blocks are wanted."""
        assert self.references[block], "only held blocks have content worth keeping"
        self._kept.add(block)

    def unkeep(self, block: int) -> None:
        """Undo keep; an idle block becomes free at once."""
        self._kept.remove(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        self._kept.remove(block)
        self.evicted(block)
        self._free.append(block)
