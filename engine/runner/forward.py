"""What runs the model: one ragged step in, head inputs and logits out. Two kinds, one interface.

Suffixes: T tokens of a step, R tokens whose result is wanted, E hidden size, V vocabulary.
"""

from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
import torch

from engine.layers.attention import Attention, Span
from engine.layers.lora import lora_batch
from engine.layers.score import ScoreHead
from engine.memory.cache import KVCache
from engine.models.decoder import Decoder, StepInput
from engine.models.spec import DecoderSpec
from engine.runner.heads import Heads
from engine.scheduling.scheduler import Row


class Forward(Protocol):
    """A model on a device with its KV pages and adapter slots. One thread."""

    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device
    kernels: str
    threads: int
    # A classifier's head, with one for each adapter slot; None for models that generate.
    score: ScoreHead | None

    def add_slots(self, slots: int, rank: int) -> None:
        """Allocate adapter slots 1 .. slots; slot 0 stays empty."""

    def fill(self, slot: int, layer: int | None, name: str, a_RI: torch.Tensor, b_RO: torch.Tensor) -> None:
        """Copy one projection's stacked matrices in: "qkv", "o", "gate_up" or "down" of a layer, or the "head"."""

    def clear(self, blocks: Many[int]) -> None:
        """Make pages finite again that are handed to a new holder, where places behind its tokens are multiplied."""

    def copy(self, blocks: Many[tuple[int, int]]) -> None:
        """Copy keys and values of whole blocks, from and to, in all layers."""

    def run(self, rows: Many[Row], take: Many[int], *, logits: bool) -> Heads:
        """Write the keys and values of rows sorted by slot; results for the tokens in `take`, ascending."""

    def logits(self, hidden_RE: torch.Tensor, slots: Many[int]) -> torch.Tensor:
        """Logits of head inputs, each with its adapter slot (ascending)."""

    def close(self) -> None:
        """Release threads."""


class TorchForward:
    """The Decoder on torch's kernels: every device, every architecture, and the native path's reference."""

    kernels = "torch"

    def __init__(self, decoder: Decoder, cache: KVCache, attention: Attention) -> None:
        self.decoder, self.cache, self.attention = decoder, cache, attention
        self.spec, self.dtype, self.device = decoder.spec, decoder.dtype, decoder.device
        self.threads = torch.get_num_threads()
        self.score = ScoreHead(decoder.score) if decoder.score is not None else None

    def add_slots(self, slots: int, rank: int) -> None:
        self.decoder.add_slots(slots, rank)

    def fill(self, slot: int, layer: int | None, name: str, a_RI: torch.Tensor, b_RO: torch.Tensor) -> None:
        weights = self.decoder.head_lora if layer is None else getattr(self.decoder.lora[layer], name)
        if weights is not None:
            weights.fill(slot, a_RI, b_RO)

    def clear(self, blocks: Many[int]) -> None:
        # Paged kernels on a GPU read a row's own tokens and nothing behind them.
        if self.device.type == "cpu":
            self.cache.clear(blocks)

    def copy(self, blocks: Many[tuple[int, int]]) -> None:
        self.cache.copy(blocks)

    def run(self, rows: Many[Row], take: Many[int], *, logits: bool) -> Heads:
        h_TE = self.states(rows)
        hidden_RE = self.decoder.final(h_TE[torch.tensor(take, dtype=torch.long, device=self.device)])
        if not logits or not take:
            return Heads(hidden_RE, hidden_RE.new_empty(0, self.spec.vocab_size))
        slots = np.repeat([row.sequence.slot for row in rows], [row.length for row in rows])
        return Heads(hidden_RE, self.logits(hidden_RE, slots[list(take)].tolist()))

    def states(self, rows: Many[Row]) -> torch.Tensor:
        """Hidden states [T, E] of all the rows' tokens, before the final norm. Valid until the next run."""
        return self.decoder.forward(self.prepare(rows), self.cache, self.attention)

    def logits(self, hidden_RE: torch.Tensor, slots: Many[int]) -> torch.Tensor:
        return self.decoder.logits(hidden_RE, lora_batch(slots, [1] * len(slots), self.device))

    def close(self) -> None:
        """Nothing to release."""

    def prepare(self, rows: Many[Row]) -> StepInput:
        """Flatten rows that are sorted by slot; see StepInput."""
        device, size = self.device, self.cache.block_size
        tokens: list[int] = []
        positions, slots, spans = [], [], []
        for row in rows:
            start, length, table = row.sequence.computed, row.length, row.table
            spans.append(Span(len(tokens), start, length, table))
            tokens += row.tokens
            places = np.arange(start, start + length)
            positions.append(places)
            slots.append(table[places // size] * size + places % size)
        return StepInput(
            tokens_T=torch.tensor(tokens, device=device),
            positions_T=torch.from_numpy(np.concatenate(positions)).to(device),
            write_index=self.cache.write_index(torch.from_numpy(np.concatenate(slots)).to(device)),
            plan=self.attention.plan(spans),
            lora=lora_batch([row.sequence.slot for row in rows], [row.length for row in rows], device),
        )
