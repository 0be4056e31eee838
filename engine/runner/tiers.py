"""Which captured graph a step takes, and its numbers padded to fit: pure functions of what the rows are.

A tier is so many rows of at most so many tokens each, keys up to a length, with adapters or without. Padding rows write
to the null block and read it; tokens beyond the last row attend to nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.memory.blocks import NULL_BLOCK
from engine.scheduling.scheduler import Row

# The shortest tier of key lengths, and how much longer each next one is. With split-KV off only the width of the block
# tables grows with it, so few tiers will do.
SHORTEST_KEYS, KEYS_GROWTH = 2048, 8


class Tier(NamedTuple):
    """Everything that shapes a launch: the key of a graph. `keys` is a multiple of the block size."""

    rows: int
    fresh: int
    keys: int
    lora: bool

    @property
    def tokens(self) -> int:
        """Tokens the forward computes, padding included."""
        return self.rows * self.fresh


class Piece(NamedTuple):
    """One row of a step: its new tokens, after `start` cached ones that lie in `table`'s blocks."""

    tokens: list[int]
    start: int
    table: NDArray[np.int64]
    slot: int


class Padded(NamedTuple):
    """A tier's numbers: int64 [4, T] (token, position, cache slot, adapter slot), and the int32 plan, flat."""

    wide_4T: NDArray[np.int64]
    narrow: NDArray[np.int32]


def row_tiers(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, and on by halves and thirds; the last is `most`."""
    ladder = [1, 2, 4, *range(8, 32, 8), *(step for power in range(5, 20) for step in (2**power, 3 * 2 ** (power - 1)))]
    return [rows for rows in ladder if rows < most] + [most]


def key_tiers(longest: int, block: int) -> list[int]:
    """SHORTEST_KEYS, then KEYS_GROWTH times longer each; the last holds `longest`. Multiples of the block size."""
    tiers, keys = [], SHORTEST_KEYS
    while keys < longest:
        tiers.append(_multiple(keys, block))
        keys *= KEYS_GROWTH
    return [*tiers, _multiple(longest, block)]


def all_tiers(rows: int, fresh: Sequence[int], longest: int, block: int, lora: bool) -> list[Tier]:
    """Every tier, largest first: later graphs then fit into the memory the first ones took."""
    tiers = [
        Tier(row_tier, fresh_tier, keys, with_lora)
        for row_tier in row_tiers(rows)
        for fresh_tier in fresh
        for keys in key_tiers(longest, block)
        for with_lora in ((False, True) if lora else (False,))
    ]
    return sorted(tiers, key=lambda tier: (tier.tokens, tier.rows, tier.keys, tier.lora), reverse=True)


def choose_tier(tiers: Sequence[Tier], pieces: Sequence[Piece]) -> Tier | None:
    """The cheapest tier that holds the step, or None when it is none's: `tiers` as all_tiers orders them."""
    fresh = max(len(piece.tokens) for piece in pieces)
    keys = max(piece.start + len(piece.tokens) for piece in pieces)
    lora = any(piece.slot for piece in pieces)
    fitting = (
        tier
        for tier in reversed(tiers)
        if tier.rows >= len(pieces) and tier.fresh >= fresh and tier.keys >= keys and tier.lora == lora
    )
    return next(fitting, None)


def padded(pieces: Sequence[Piece], tier: Tier, block: int) -> Padded:
    """The step's numbers, filled up to the tier.

    Tokens left over form padding rows over the null block, `tier.fresh` each while they last. Rows shorter than the
    tier's leave more tokens over than rows; those lie beyond the last row and only write to the null block.
    """
    held = len(pieces)
    counts, starts, adapters = np.zeros((3, tier.rows), dtype=np.int64)
    counts[:held] = [len(piece.tokens) for piece in pieces]
    starts[:held] = [piece.start for piece in pieces]
    adapters[:held] = [piece.slot for piece in pieces]
    counts[held:] = _shares(tier.tokens - int(counts.sum()), tier.rows - held, tier.fresh)
    tables = np.full((tier.rows, tier.keys // block), NULL_BLOCK, dtype=np.int64)
    for row, piece in enumerate(pieces):
        blocks = piece.table[: tables.shape[1]]
        tables[row, : len(blocks)] = blocks
    lengths, ends = starts + counts, counts.cumsum()
    rows_T = np.repeat(np.arange(tier.rows), counts)
    positions_T = np.arange(len(rows_T)) + (starts - ends + counts)[rows_T]
    wide_4T = np.zeros((4, tier.tokens), dtype=np.int64)
    tokens = [token for piece in pieces for token in piece.tokens]
    wide_4T[0, : len(tokens)] = tokens
    wide_4T[1, : len(rows_T)] = positions_T
    wide_4T[2, : len(rows_T)] = tables[rows_T, positions_T // block] * block + positions_T % block
    wide_4T[3, : len(rows_T)] = adapters[rows_T]
    plan = ([0], ends, lengths, [0], lengths.cumsum(), tables.reshape(-1))
    return Padded(wide_4T, np.concatenate(plan).astype(np.int32))


def _shares(tokens: int, rows: int, most: int) -> list[int]:
    """Leftover tokens dealt to padding rows, `most` each while they last."""
    return [min(most, max(0, tokens - most * row)) for row in range(rows)]


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def piece_of(row: Row) -> Piece:
    """What a scheduled row computes."""
    return Piece(row.tokens, row.sequence.computed, row.table, row.sequence.slot)
