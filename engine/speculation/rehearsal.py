"""Steps of any size on made-up rows, to measure what they cost before the first request comes."""

from collections.abc import Callable

import numpy as np

from engine.memory.blocks import BlockPool
from engine.messages import Generate, Sampling
from engine.runner.runner import Runner
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence


def rehearsal(runner: Runner, pool: BlockPool, positions: int) -> Callable[[int, int, int], None]:
    """A function of (rows, tokens, context) that computes and samples such a step. It writes to blocks nobody holds."""
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=1)
    blocks, size = pool.total, pool.block_size
    longest = min(positions, blocks * size)

    def run(rows: int, tokens: int, context: int) -> None:
        made, free = [], blocks
        # No row is longer than a sequence can be.
        rows = min(tokens, max(rows, -(-tokens // longest)))
        for number in range(rows):
            length = tokens // rows + (number < tokens % rows)
            start = min(context, longest - length)
            sequence = Sequence(b"", Generate(id="", prompt=[0] * (start + 1), sampling=sampling), 0, positions)
            sequence.computed = start
            needed = -(-(start + length) // size)
            # Rows of a large step share what the cache holds.
            sequence.table = (np.arange(free - needed, free) % blocks + 1).astype(np.int64)
            free -= needed
            made.append(Row(sequence, length, (0,) * (length - 1)))
        runner.step(made)

    return run
