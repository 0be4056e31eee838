"""Steps of any size on made-up rows, to measure what they cost before the first request comes."""

from collections.abc import Callable

import numpy as np

from engine.memory.blocks import BlockPool
from engine.messages import Generate, Sampling
from engine.runner.runner import Runner
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence

# Rows of a measured step verify up to so many tokens each.
ROW_TOKENS = 8


def rehearsal(runner: Runner, pool: BlockPool, positions: int) -> Callable[[int, int], None]:
    """A function of (tokens, context) that computes and samples such a step. It writes to blocks nobody holds yet."""
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=1)
    blocks, block_size = pool.total, pool.block_size

    def run(tokens: int, context: int) -> None:
        context = max(0, min(context, positions, blocks * block_size) - ROW_TOKENS)
        rows, free = [], blocks
        for start in range(0, tokens, ROW_TOKENS):
            length = min(ROW_TOKENS, tokens - start)
            request = Generate(id="", prompt=[0] * (context + 1), sampling=sampling)
            sequence = Sequence(b"", request, 0, positions)
            sequence.computed = context
            needed = -(-(context + length) // block_size)
            # Rows of a large step share what the cache holds.
            table = np.arange(free - needed, free) % blocks + 1
            sequence.table, free = table.astype(np.int64), free - needed
            rows.append(Row(sequence, length, (0,) * (length - 1)))
        runner.step(rows)

    return run
