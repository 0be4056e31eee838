"""One step: rows to tensors, one forward over the flattened tokens, one sampler."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from engine.layers.attention import Attention, Span
from engine.layers.lora import lora_batch
from engine.layers.sampler import Sampled
from engine.memory.cache import KVCache
from engine.models.decoder import Decoder, StepInput
from engine.runner.sampling import draw
from engine.scheduling.scheduler import Row


@dataclass
class StepOutput:
    """Rows in the order they were computed, the sampled tokens of those that sample, and the head's input for them."""

    rows: list[Row]
    sampled: Sampled
    hidden_RE: torch.Tensor


class Runner:
    """Runs scheduled rows on the model. Knows neither requests' lives nor the pool."""

    def __init__(self, decoder: Decoder, cache: KVCache, attention: Attention) -> None:
        self.decoder, self.cache, self.attention = decoder, cache, attention

    @torch.inference_mode()
    def step(self, rows: Rows[Row]) -> StepOutput:
        """Compute every row's tokens and draw the next token of those that reach their end."""
        ordered = sorted(rows, key=lambda row: (row.sequence.slot, row.length, row.sequence.computed))
        h_TE = self.decoder.forward(self.prepare(ordered), self.cache, self.attention)
        ends = np.cumsum([row.length for row in ordered]) - 1
        sampling = [index for index, row in enumerate(ordered) if row.samples]
        last_R = torch.from_numpy(ends[sampling]).to(h_TE.device)
        hidden_RE = self.decoder.final(h_TE[last_R])
        return StepOutput(ordered, self._sample([ordered[index] for index in sampling], hidden_RE), hidden_RE)

    @torch.inference_mode()
    def hidden(self, rows: Rows[Row]) -> torch.Tensor:
        """Head input [T, E] for every token of the rows, in their order; they must be sorted by slot."""
        return self.decoder.final(self.decoder.forward(self.prepare(rows), self.cache, self.attention))

    def prepare(self, rows: Rows[Row]) -> StepInput:
        """Flatten rows that are sorted by slot; see StepInput."""
        device, size = self.decoder.device, self.cache.block_size
        tokens: list[int] = []
        positions, slots, spans = [], [], []
        for sequence, length in rows:
            start, table = sequence.computed, sequence.table
            assert table is not None, "scheduled sequences hold blocks"
            spans.append(Span(len(tokens), start, length, table))
            tokens += sequence.tokens[start : start + length]
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

    def _sample(self, rows: Rows[Row], hidden_RE: torch.Tensor) -> Sampled:
        if not rows:
            return Sampled([], [])
        lora = lora_batch([row.sequence.slot for row in rows], [1] * len(rows), self.decoder.device)
        return draw(rows, self.decoder.logits(hidden_RE, lora))
