"""CUDA graphs for the steps that generate: one launch instead of hundreds.

A graph is captured per tier (engine/runner/tiers.py). A step is padded to the smallest tier that holds it, and its
numbers are copied into that tier's fixed buffers. Adapter weights live in fixed slot tensors (see LoraBatch.static), so
graphs survive swaps.
Suffixes: T tokens of the tier, E hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.layers.lora import LoraBatch
from engine.layers.varlen import VarlenAttention, VarlenPlan
from engine.memory.cache import KVCache
from engine.models.decoder import Decoder, StepInput
from engine.models.spec import DecoderSpec
from engine.runner.forward import TorchForward
from engine.runner.tiers import Padded, Tier, all_tiers, choose_tier, padded, piece_of
from engine.scheduling.scheduler import Row

# Forwards before a capture: libraries allocate workspaces and choose kernels in their first calls.
WARM_UPS = 2


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
