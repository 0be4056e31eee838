"""Driving a decoder by hand, without scheduler or sampler: rows of any number of tokens after any number of cached."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.layers.attention import GatherAttention, Span
from engine.memory.cache import KVCache
from engine.models.decoder import Decoder, StepInput
from engine.models.registry import read_spec

BLOCK, BLOCKS, CONTEXT = 16, 96, 256
CPU = torch.device("cpu")


@dataclass
class Text:
    """One sequence: all its tokens, how many are computed, its pages."""

    tokens: list[int]
    table: NDArray[np.int64]
    computed: int = 0
    states: list[torch.Tensor] = field(default_factory=list)


class Forwarding:
    """An fp32 decoder with a paged cache; `advance` is one step."""

    def __init__(self, directory: Path, *, pack: bool = True, positions: int = CONTEXT) -> None:
        spec = read_spec(directory)
        self.decoder = Decoder(spec, directory, dtype=torch.float32, device=CPU, positions=positions, pack=pack)
        self.cache = KVCache(spec, BLOCKS, BLOCK, torch.float32, CPU)
        self.attention = GatherAttention(spec, self.cache, CPU, torch.float32)
        self._free = list(range(1, BLOCKS + 1))

    def start(self, tokens: list[int]) -> Text:
        """A sequence with scattered pages for all its tokens; the rest of its table is the null block."""
        table = np.zeros(CONTEXT // BLOCK, dtype=np.int64)
        pages = -(-len(tokens) // BLOCK)
        table[:pages] = self._free[: 2 * pages : 2]
        self._free = [page for page in self._free if page not in set(table.tolist())]
        return Text(tokens, table)

    @torch.inference_mode()
    def advance(self, rows: Sequence[tuple[Text, int]]) -> None:
        """Compute the next `fresh` tokens of every row together; their head inputs are added to `states`."""
        places = [np.arange(text.computed, text.computed + fresh) for text, fresh in rows]
        slots = [text.table[p // BLOCK] * BLOCK + p % BLOCK for (text, _), p in zip(rows, places, strict=True)]
        ends = np.cumsum([0, *(fresh for _, fresh in rows)])
        spans = [
            Span(int(end), text.computed, fresh, text.table) for end, (text, fresh) in zip(ends, rows, strict=False)
        ]
        step = StepInput(
            tokens_T=torch.tensor(
                [token for (text, _), p in zip(rows, places, strict=True) for token in np.array(text.tokens)[p]]
            ),
            positions_T=torch.from_numpy(np.concatenate(places)),
            write_index=self.cache.write_index(torch.from_numpy(np.concatenate(slots))),
            plan=self.attention.plan(spans),
            lora=None,
        )
        states = self.decoder.final(self.decoder.forward(step, self.cache, self.attention))
        for (text, fresh), (first, last) in zip(rows, pairwise(ends), strict=True):
            text.states.append(states[first:last].clone())
            text.computed += fresh

    @torch.inference_mode()
    def output(self, text: Text) -> torch.Tensor:
        """Logits [tokens, vocabulary], or a classifier's scores [tokens, labels], of everything computed."""
        states = torch.cat(text.states)
        if self.decoder.score is not None:
            return states @ self.decoder.score.T
        return self.decoder.logits(states, None)

    def alone(self, tokens: list[int], chunks: Sequence[int]) -> torch.Tensor:
        """`output` of one sequence computed in these chunks."""
        text = self.start(tokens)
        for chunk in chunks:
            self.advance([(text, chunk)])
        self._free += [page for page in text.table.tolist() if page]
        return self.output(text)
