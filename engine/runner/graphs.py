"""CUDA graphs for the steps that generate: one launch instead of hundreds.

A graph is captured per tier: so many rows of at most so many tokens each, keys up to a length, with adapters or
without. A step is padded to the smallest tier that holds it and its numbers are copied into that tier's fixed buffers.
Padding rows write to the null block and read it; tokens beyond the last row attend to nothing. Adapter weights live in
fixed slot tensors (see LoraBatch.static), so graphs survive swaps.
Suffixes: T tokens of the tier, E hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.layers.lora import LoraBatch
from engine.layers.varlen import VarlenAttention, VarlenPlan
from engine.memory.blocks import NULL_BLOCK
from engine.memory.cache import KVCache
from engine.models.decoder import Decoder, StepInput
from engine.models.spec import DecoderSpec
from engine.runner.forward import TorchForward
from engine.scheduling.scheduler import Row

# Forwards before a capture: libraries allocate workspaces and choose kernels in their first calls.
WARM_UPS = 2
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
    wide_4T = np.zeros((4, tier.tokens), dtype=np.int64)
    counts, lengths = np.zeros((2, tier.rows), dtype=np.int64)
    tables = np.full((tier.rows, tier.keys // block), NULL_BLOCK, dtype=np.int64)
    offset = 0
    for row in range(tier.rows):
        piece = pieces[row] if row < len(pieces) else _padding(min(tier.fresh, tier.tokens - offset), tables[row])
        counts[row], lengths[row] = len(piece.tokens), piece.start + len(piece.tokens)
        held = piece.table[: tables.shape[1]]
        tables[row, : len(held)] = held
        places = np.arange(piece.start, lengths[row])
        wide_4T[:2, offset : offset + counts[row]] = piece.tokens, places
        wide_4T[2, offset : offset + counts[row]] = held[places // block] * block + places % block
        wide_4T[3, offset : offset + counts[row]] = piece.slot
        offset += len(piece.tokens)
    plan = ([0], counts.cumsum(), lengths, [0], lengths.cumsum(), tables.reshape(-1))
    return Padded(wide_4T, np.concatenate(plan).astype(np.int32))


def _padding(count: int, null_table: NDArray[np.int64]) -> Piece:
    return Piece([0] * count, 0, null_table, 0)


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


@dataclass(frozen=True)
class StaticInput:
    """A tier's fixed buffers on the device and their staging copies on the host (pinned for a GPU)."""

    tier: Tier
    wide_4T: torch.Tensor
    narrow: torch.Tensor
    staged_wide_4T: torch.Tensor
    staged_narrow: torch.Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def make(cls, tier: Tier, block: int, device: torch.device) -> "StaticInput":
        """Buffers holding a step of nothing but padding."""
        pinned = device.type == "cuda"
        wide_4T, narrow = (torch.from_numpy(part) for part in padded([], tier, block))
        return cls(
            tier=tier,
            wide_4T=wide_4T.to(device, copy=True),
            narrow=narrow.to(device, copy=True),
            staged_wide_4T=wide_4T.pin_memory() if pinned else wide_4T,
            staged_narrow=narrow.pin_memory() if pinned else narrow,
            copied=torch.cuda.Event() if pinned else None,  # type: ignore[no-untyped-call]  # untyped in torch
        )

    def fill(self, numbers: Padded) -> None:
        """Copy a step in, asynchronously: staging memory is reused only once its last copy is done."""
        if self.copied is not None:
            self.copied.synchronize()
        self.staged_wide_4T.copy_(torch.from_numpy(numbers.wide_4T))
        self.staged_narrow.copy_(torch.from_numpy(numbers.narrow))
        self.wide_4T.copy_(self.staged_wide_4T, non_blocking=True)
        self.narrow.copy_(self.staged_narrow, non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def step(self, cache: KVCache) -> StepInput:
        """The buffers as a step. Called inside the forward, so that what it derives is captured too."""
        tokens_T, positions_T, slots_T, adapters_T = self.wide_4T.unbind(0)
        return StepInput(
            tokens_T=tokens_T,
            positions_T=positions_T,
            write_index=cache.write_index(slots_T),
            plan=self._plan(),
            lora=LoraBatch((), adapters_T, static=True) if self.tier.lora else None,
        )

    def _plan(self) -> VarlenPlan:
        rows = self.tier.rows
        sizes = [rows + 1, rows, rows + 1, len(self.narrow) - 3 * rows - 2]
        queries, keys, key_offsets, tables = torch.split(self.narrow, sizes)
        return VarlenPlan(
            queries, keys, key_offsets, tables.view(rows, -1), self.tier.fresh, self.tier.keys, padded=True
        )


Compute = Callable[[], torch.Tensor]


class Replay(Protocol):
    """A forward over fixed buffers that can be run again and again; its result is valid until the next run."""

    def __call__(self) -> torch.Tensor:
        """Hidden states [T, E]."""


class CapturedForward:
    """A forward recorded as a CUDA graph. All of a process share one memory pool: they never run at once."""

    def __init__(self, forward: Compute, pool: torch.cuda._POOL_HANDLE) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._out_TE = forward()

    def __call__(self) -> torch.Tensor:
        self._graph.replay()
        return self._out_TE


class GraphedForward(TorchForward):
    """TorchForward that replays a step's tier, and computes eagerly what no tier holds: prompts, mostly.

    `rows` and `longest` are the most sequences and tokens of one; `fresh` the tiers of tokens per row: 1 to generate,
    1 + k to verify k drafted ones. `record` makes a Replay of a forward; without it graphs are captured on the GPU.
    """

    kernels = "torch, CUDA graphs"

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        attention: VarlenAttention,
        *,
        rows: int,
        longest: int,
        fresh: Sequence[int] = (1,),
        record: Callable[[Compute], Replay] | None = None,
    ) -> None:
        super().__init__(decoder, cache, attention)
        self._rows, self._longest, self._fresh = rows, longest, fresh
        self._record = record
        self._graphs: dict[Tier, tuple[StaticInput, Replay]] = {}

    def add_slots(self, slots: int, rank: int) -> None:
        """Allocate adapter slots, then record every tier: graphs hold the slot tensors' addresses."""
        super().add_slots(slots, rank)
        self.warm_up()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Record every tier. The first step does, when no slots were added before."""
        record = self._record or _capture()
        block = self.cache.block_size
        for tier in all_tiers(self._rows, self._fresh, self._longest, block, bool(self.decoder.lora)):
            inputs = StaticInput.make(tier, block, self.device)
            self._graphs[tier] = inputs, record(self._compute_of(inputs))

    @torch.inference_mode()
    def states(self, rows: Sequence[Row]) -> torch.Tensor:
        if not self._graphs:
            self.warm_up()
        pieces = [piece_of(row) for row in rows]
        tier = choose_tier(list(self._graphs), pieces)
        if tier is None:
            return super().states(rows)
        inputs, replay = self._graphs[tier]
        inputs.fill(padded(pieces, tier, self.cache.block_size))
        return replay()[: sum(len(piece.tokens) for piece in pieces)]

    def close(self) -> None:
        """Let the graphs and their memory go."""
        self._graphs.clear()
        super().close()

    def _compute_of(self, inputs: StaticInput) -> Compute:
        return lambda: self.decoder.forward(inputs.step(self.cache), self.cache, self.attention)


def capturable(spec: DecoderSpec) -> bool:
    """Whether a forward launches the same kernels whatever the numbers: experts take turns by what the router says."""
    return spec.moe is None


def _capture() -> Callable[[Compute], Replay]:
    pool = torch.cuda.graph_pool_handle()
    return lambda compute: CapturedForward(compute, pool)


def piece_of(row: Row) -> Piece:
    """What a scheduled row computes."""
    sequence, table = row.sequence, row.sequence.table
    assert table is not None, "scheduled sequences hold blocks"
    return Piece(
        sequence.tokens[sequence.computed : sequence.computed + row.length], sequence.computed, table, sequence.slot
    )
