"""A tiny decoder with random adapters and hand-made sequences: what graph tests on CPU and GPU share."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.layers.attention import Attention, GatherAttention, Span
from engine.layers.lora import lora_batch
from engine.layers.varlen import Kernel, VarlenAttention
from engine.memory.cache import KVCache
from engine.messages import Generate, Sampling
from engine.models.decoder import Decoder, StepInput
from engine.models.registry import read_spec
from engine.runner.graphs import Compute, GraphedForward, Replay
from engine.runner.tiers import piece_of
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence

BLOCKS, RANK, SLOTS, LONGEST = 60, 4, 5, 128


class OnlyReplays(GraphedForward):
    """Computes nothing eagerly, so that a test of replays cannot pass without one."""

    def prepare(self, rows: Many[Row]) -> StepInput:
        raise AssertionError("this step should have a tier")


class World:
    """A tiny decoder with random adapters, and sequences whose tokens are cached up to some length."""

    def __init__(
        self,
        directory: Path,
        *,
        kernel: Kernel,
        block: int,
        windows: tuple[int, ...] = (0, 0),
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.device, self.block = torch.device(device), block
        spec = replace(read_spec(directory), windows=windows)
        self.decoder = Decoder(spec, directory, dtype=dtype, device=self.device, positions=LONGEST)
        self.decoder.add_slots(SLOTS, RANK)
        self.cache = KVCache(spec, BLOCKS, block, dtype, self.device)
        self.varlen = VarlenAttention(spec, self.cache, self.device, kernel=kernel)
        self.gather = GatherAttention(spec, self.cache, self.device, dtype)
        self.free = list(np.random.default_rng(0).permutation(np.arange(1, BLOCKS + 1)))
        for slot in range(1, SLOTS + 1):
            self.install(slot, seed=slot)

    def install(self, slot: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in self.decoder.lora:
            for weights in (layer.qkv, layer.o, layer.gate_up, layer.down):
                assert weights is not None
                a_RI, b_RO = weights.a_SRI[0], weights.b_SRO[0]
                weights.fill(slot, *(0.1 * torch.randn(part.shape, generator=generator) for part in (a_RI, b_RO)))

    def sequence(self, length: int, slot: int = 0) -> Sequence:
        """`length` random tokens with blocks to hold them, none computed."""
        tokens = np.random.default_rng(length).integers(4, 160, length).tolist()
        request = Generate(id=str(length), prompt=tokens, sampling=Sampling(max_tokens=8, seed=0))
        sequence = Sequence(b"", request, 0, LONGEST)
        sequence.table, sequence.slot = np.zeros(8, dtype=np.int64), slot
        for index in range(-(-length // self.block)):
            sequence.table[index] = self.free.pop()
        return sequence

    @torch.inference_mode()
    def eager(self, rows: list[Row], attention: Attention | None = None) -> torch.Tensor:
        """The unpadded forward, over the gathering attention unless told otherwise."""
        attention = attention or self.gather
        pieces = [piece_of(row) for row in rows]
        counts = [len(item.tokens) for item in pieces]
        places = [np.arange(item.start, item.start + len(item.tokens)) for item in pieces]
        slots = [
            item.table[at // self.block] * self.block + at % self.block for item, at in zip(pieces, places, strict=True)
        ]
        offsets = np.cumsum([0, *counts]).tolist()
        spans = [
            Span(offset, item.start, len(item.tokens), item.table)
            for offset, item in zip(offsets, pieces, strict=False)
        ]
        step = StepInput(
            tokens_T=torch.tensor([token for item in pieces for token in item.tokens], device=self.device),
            positions_T=torch.from_numpy(np.concatenate(places)).to(self.device),
            write_index=self.cache.write_index(torch.from_numpy(np.concatenate(slots)).to(self.device)),
            plan=attention.plan(spans),
            lora=lora_batch([item.slot for item in pieces], counts, self.device),
        )
        return self.decoder.forward(step, self.cache, attention)

    def graphed(
        self, rows: int, fresh: tuple[int, ...], record: Callable[[Compute], Replay] | None = None
    ) -> GraphedForward:
        """Graphs of this decoder; a step that no tier holds fails."""
        return OnlyReplays(
            self.decoder, self.cache, self.varlen, rows=rows, longest=LONGEST, fresh=fresh, record=record
        )

    def prefilled(self, shapes: list[tuple[int, int, int]]) -> list[Row]:
        """Rows (cached tokens, new tokens, slot), the cached ones computed."""
        rows = []
        for start, fresh, slot in shapes:
            sequence = self.sequence(start + fresh, slot)
            if start:
                self.eager([Row(sequence, start)])
            sequence.computed = start
            rows.append(Row(sequence, fresh))
        return rows
