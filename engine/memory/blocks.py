"""Who holds which KV block. Block 0 is the null block: padding reads and writes it, nobody owns it."""

NULL_BLOCK = 0


class OutOfBlocks(RuntimeError):
    """The pool cannot give that many blocks: preempt somebody or wait."""


class BlockPool:
    """Free blocks of the KV cache, each `block_size` tokens. Only the scheduler takes and returns them."""

    def __init__(self, tokens: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = tokens // block_size
        self._free = list(range(self.total, NULL_BLOCK, -1))
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` blocks, all or none. Raises OutOfBlocks."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        self._held.update(taken)
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks. Returning one twice is our bug and fails at once."""
        for block in blocks:
            assert block in self._held, f"block {block} was returned twice"
            self._held.remove(block)
            self._free.append(block)
