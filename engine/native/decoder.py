"""The native CPU path: a whole step in one C++ call. The reference it is tested against is the Decoder.

Suffixes as in engine/models/decoder.py.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from engine.layers.score import ScoreHead
from engine.models.decoder import Decoder
from engine.models.spec import DecoderSpec
from engine.native.library import PANEL, Step, functions
from engine.native.packing import Packing
from engine.native.weights import NativeLora
from engine.runner.heads import Heads
from engine.runner.placement import Pool
from engine.scheduling.scheduler import Row

BLOCK = 16
MOST_RANK = 256


def unsupported(spec: DecoderSpec, rank: int) -> str:
    """Why this model cannot take the native path, as a sentence; empty when it can."""
    if spec.head_dim % PANEL or spec.hidden_size % PANEL:
        return f"head and hidden sizes must be multiples of {PANEL}"
    if spec.labels:
        return "models with a classification head run on torch's kernels"
    if rank > MOST_RANK:
        return f"adapter ranks above {MOST_RANK} run on torch's kernels"
    return ""


class NativeDecoder:
    """Weights, KV pages, adapter slots and threads of the C++ engine.

    Raises NoNative when the library cannot be built, MemoryError when buffers cannot be had.
    """

    def __init__(
        self, decoder: Decoder, packing: Packing, *, blocks: int, tokens: int, positions: int, pool: Pool
    ) -> None:
        self._native = functions()
        self.spec = spec = decoder.spec
        self.dtype = decoder.dtype
        self.device = decoder.device
        self.tokens = tokens
        self.score: ScoreHead | None = None
        self.kernels = f"native {self._native.whet_instructions(decoder.dtype != torch.float32).decode()}"
        self._threads = pool.threads
        self._packing, self._arena, self._layers = packing, packing.arena, packing.layers
        self._loras: dict[tuple[int | None, str], NativeLora] = {}
        self._model = packing.model(decoder, positions)
        self._model.tokens = tokens
        self._model.solo = pool.solo
        pages = (spec.layers, blocks + 1, spec.kv_heads, BLOCK * spec.head_dim)
        self._keys, self._values = (self._arena.zeros(pages, decoder.dtype) for _ in range(2))
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self._engine: int | None = self._open()
        self.threads = self._native.whet_threads(self._engine)
        self._step = Step()
        self._hidden = torch.empty(0, spec.hidden_size)
        self._logits = torch.empty(0, self._model.head.outputs)

    def add_slots(self, slots: int, rank: int) -> None:
        """Allocate the adapter slot tensors; slot 0 stays empty."""
        spec = self.spec
        kv, wide, narrow = spec.kv_heads * spec.head_dim, spec.intermediate_size, spec.hidden_size

        def make(in_size: int, *parts: int, interleaved: bool = False) -> NativeLora:
            return NativeLora(slots + 1, rank, in_size, parts, self.dtype, self._arena, interleaved=interleaved)

        for index, layer in enumerate(self._layers):
            made = {"qkv": make(narrow, spec.attention_size, kv, kv), "o": make(spec.attention_size, narrow)}
            if not spec.sparse[index]:
                made |= {"gate_up": make(narrow, wide, wide, interleaved=True), "down": make(wide, narrow)}
            for name, lora in made.items():
                setattr(layer, f"lora_{name}", lora.structure())
                self._loras[index, name] = lora
        head = self._loras[None, "head"] = make(narrow, spec.vocab_size)
        self._model.lora_head = head.structure()
        self.close()
        self._engine = self._open()

    def fill(self, slot: int, layer: int | None, name: str, a_RI: torch.Tensor, b_RO: torch.Tensor) -> None:
        """Copy one projection's stacked matrices into a slot nobody reads. Experts have none."""
        if (layer, name) in self._loras:
            self._loras[layer, name].fill(slot, a_RI, b_RO)

    def clear(self, blocks: Sequence[int]) -> None:
        """Nothing to do: the loops end with a row's own tokens."""

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values of whole blocks, from and to, in all layers."""
        for source, target in blocks:
            self._keys[:, target] = self._keys[:, source]
            self._values[:, target] = self._values[:, source]

    def run(self, rows: Sequence[Row], take: Sequence[int], *, logits: bool) -> Heads:
        """Head inputs [R, E] of the tokens in `take` (ascending) and, if wanted, their logits [R, V], both fp32.

        Keys and values of all rows are written. The results are valid until the next run.
        """
        token_ids: list[int] = []
        starts, lengths, slots, tables = [], [], [], []
        for row in rows:
            sequence = row.sequence
            token_ids += row.tokens
            starts.append(sequence.computed)
            lengths.append(row.length)
            slots.append(sequence.slot)
            tables.append(row.table.__array_interface__["data"][0])
        if sum(lengths) != len(token_ids) or len(token_ids) > self.tokens:
            raise ValueError(f"a step computes up to {self.tokens} tokens that its sequences have, not {sum(lengths)}")
        count, longs = len(rows), np.array(token_ids + tables, dtype=np.int64)
        ints = np.array(starts + lengths + slots + list(take), dtype=np.int32)
        long_at, int_at = (array.__array_interface__["data"][0] for array in (longs, ints))
        hidden, out = self._outputs(len(take), logits)
        step = self._step
        step.rows, step.tokens, step.takes = count, len(token_ids), len(take)
        step.token_ids, step.tables = long_at, long_at + 8 * len(token_ids)
        step.starts, step.lengths, step.slots = int_at, int_at + 4 * count, int_at + 8 * count
        step.take = int_at + 12 * count
        step.hidden, step.logits = hidden.data_ptr(), out.data_ptr() if logits else None
        self._native.whet_forward(self._engine, ctypes.byref(step))
        return Heads(hidden, out[:, : self.spec.vocab_size])

    def logits(self, hidden_RE: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """Logits [R, V] of head inputs, each with its adapter slot; fp32, a fresh tensor."""
        hidden, rows = hidden_RE.float().contiguous(), np.array(slots, dtype=np.int32)
        out = torch.empty(len(hidden), self._model.head.outputs)
        for start in range(0, len(hidden), self.tokens):
            part = slice(start, start + self.tokens)
            count, at = len(hidden[part]), rows[part].ctypes.data
            self._native.whet_project(self._engine, hidden[part].data_ptr(), at, count, out[part].data_ptr())
        return out[:, : self.spec.vocab_size]

    @property
    def handle(self) -> int | None:
        """The C++ engine, whose threads drafting shares; valid until the next add_slots or close."""
        return self._engine

    def close(self) -> None:
        """End the threads; nothing may be run afterwards."""
        engine, self._engine = self._engine, None
        if engine:
            self._native.whet_close(engine)

    def _open(self) -> int:
        engine: int | None = self._native.whet_open(ctypes.byref(self._model), self._threads)
        if not engine:
            raise MemoryError("the native CPU path could not allocate its buffers")
        return engine

    def _outputs(self, rows: int, logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._hidden) < rows:
            self._hidden = torch.empty(rows, self._hidden.shape[1])
        if logits and len(self._logits) < rows:
            self._logits = torch.empty(rows, self._logits.shape[1])
        return self._hidden[:rows], self._logits[:rows]
