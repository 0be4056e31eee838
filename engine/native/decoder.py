"""The native CPU path: a whole step in one C++ call. Built from a Decoder, whose dense weights it packs and frees.

The reference it is tested against is the Decoder itself. Suffixes as in engine/models/decoder.py.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from engine.layers.linear import Linear
from engine.layers.rope import Rope
from engine.layers.score import ScoreHead
from engine.models.decoder import Decoder
from engine.models.decoder import Layer as DecoderLayer
from engine.models.spec import DecoderSpec
from engine.native.library import PANEL, Layer, Lora, Matrix, Model, Step, functions
from engine.native.memory import Arena
from engine.native.weights import NativeLora, Packed, interleave, pad, padded
from engine.runner.heads import Heads
from engine.runner.placement import Pool, parameters
from engine.scheduling.scheduler import Row

BLOCK = 16
MOST_RANK = 256
# Weights above this are read from memory at each step; last-level caches are about this large.
CACHE_BYTES = 32 << 20


def unsupported(spec: DecoderSpec, rank: int) -> str:
    """Why this model cannot take the native path, as a sentence; empty when it can."""
    if spec.moe is not None:
        return "mixture-of-experts layers run on torch's kernels"
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

    def __init__(self, decoder: Decoder, *, blocks: int, tokens: int, positions: int, pool: Pool, int8: bool) -> None:
        self._native = functions()
        self.spec = spec = decoder.spec
        self.dtype = decoder.dtype
        self.tokens = tokens
        self._positions = positions
        self.device = decoder.device
        self.score: ScoreHead | None = None
        self.kernels = f"native {self._native.whet_instructions().decode()}"
        self._threads = pool.threads
        self._keep: list[torch.Tensor] = []
        self._loras: dict[tuple[int | None, str], NativeLora] = {}
        self._int8 = int8
        self._far = parameters(spec) * (1 if int8 else decoder.dtype.itemsize) > CACHE_BYTES
        pages = (spec.layers, blocks + 1, spec.kv_heads, BLOCK * spec.head_dim)
        self._arena = Arena()
        self._keys, self._values = (self._arena.zeros(pages, decoder.dtype) for _ in range(2))
        self._layers = (Layer * spec.layers)(*[self._layer(index, layer) for index, layer in enumerate(decoder.layers)])
        self._model = self._describe(decoder)
        self._model.tokens = tokens
        self._model.context = positions
        self._model.solo = pool.solo
        self._engine: int | None = self._open()
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
            made = {
                "qkv": make(narrow, spec.attention_size, kv, kv),
                "o": make(spec.attention_size, narrow),
                "gate_up": make(narrow, wide, wide, interleaved=True),
                "down": make(wide, narrow),
            }
            for name, lora in made.items():
                setattr(layer, f"lora_{name}", lora.structure())
                self._loras[index, name] = lora
        head = self._loras[None, "head"] = make(narrow, spec.vocab_size)
        self._model.lora_head = head.structure()
        self._native.whet_close(self._engine)
        self._engine = self._open()

    def fill(self, slot: int, layer: int | None, name: str, a_RI: torch.Tensor, b_RO: torch.Tensor) -> None:
        """Copy one projection's stacked matrices into a slot nobody reads."""
        self._loras[layer, name].fill(slot, a_RI, b_RO)

    def run(self, rows: Sequence[Row], take: Sequence[int], *, logits: bool) -> Heads:
        """Head inputs [R, E] of the tokens in `take` (ascending) and, if wanted, their logits [R, V], both fp32.

        Keys and values of all rows are written. The results are valid until the next run.
        """
        token_ids: list[int] = []
        starts, lengths, slots, tables = [], [], [], []
        for sequence, length in rows:
            start, table = sequence.computed, sequence.table
            assert table is not None, "scheduled sequences hold blocks"
            token_ids += sequence.tokens[start : start + length]
            starts.append(start)
            lengths.append(length)
            slots.append(sequence.slot)
            tables.append(table.__array_interface__["data"][0])
        assert len(token_ids) <= self.tokens, "the scheduler keeps steps within the buffers"
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

    def close(self) -> None:
        """End the threads; nothing may be run afterwards."""
        if self._engine:
            self._native.whet_close(self._engine)
            self._engine = None

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

    def _kept(self, tensor: torch.Tensor | None) -> int | None:
        """The address of an fp32 copy that lives as long as we do."""
        if tensor is None:
            return None
        self._keep.append(tensor.float().contiguous())
        return self._keep[-1].data_ptr()

    def _packed(self, linear: Linear, weight: torch.Tensor) -> Matrix:
        packed = Packed.of(pad(weight), linear.bias, self._arena, int8=self._int8)
        packed.matrix.far = self._far
        self._keep += packed.tensors
        # The dense copy is let go layer by layer, so that loading never holds the model twice.
        linear.weight = torch.empty(0)
        return packed.matrix

    def _layer(self, index: int, layer: DecoderLayer) -> Layer:
        assert layer.gate_up is not None, "dense layers only"
        assert layer.down is not None, "dense layers only"
        gates = [pad(half) for half in layer.gate_up.weight.chunk(2)]
        bias = layer.gate_up.bias
        if bias is not None:
            halves = [pad(half[:, None])[:, :1] for half in bias.chunk(2)]
            layer.gate_up.bias = interleave(torch.cat(halves)).squeeze(1)
        return Layer(
            qkv=self._packed(layer.qkv, layer.qkv.weight),
            o=self._packed(layer.o, layer.o.weight),
            gate_up=self._packed(layer.gate_up, interleave(torch.cat(gates))),
            down=self._packed(layer.down, layer.down.weight),
            attention_norm=self._kept(layer.attention_norm_E),
            mlp_norm=self._kept(layer.mlp_norm_E),
            q_norm=self._kept(layer.q_norm_D),
            k_norm=self._kept(layer.k_norm_D),
            keys=self._keys[index].data_ptr(),
            values=self._values[index].data_ptr(),
            window=self.spec.windows[index],
        )

    def _describe(self, decoder: Decoder) -> Model:
        spec = decoder.spec
        half = spec.head_dim // 2
        embedding = None
        if not spec.tied:
            self._keep.append(self._arena.copy(decoder.embedding_VE))
            embedding = self._keep[-1].data_ptr()
        # In fp32 whatever the model computes in: the products round, the angles need not.
        cos, sin = Rope(spec.rope, spec.head_dim, self._positions, torch.float32, self.device).tables()
        assert decoder.head is not None, "models with an LM head only"
        return Model(
            layers=spec.layers, hidden=spec.hidden_size, intermediate=padded(spec.intermediate_size),
            heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim, vocabulary=spec.vocab_size,
            fp32=int(decoder.dtype == torch.float32), eps=spec.norm_eps, scale=spec.head_dim**-0.5,
            layer=ctypes.cast(self._layers, ctypes.POINTER(Layer)),
            head=self._packed(decoder.head, decoder.head.weight), lora_head=Lora(), embedding=embedding,
            norm=self._kept(decoder.norm_E), cos=self._kept(cos[:, :half]), sin=self._kept(sin[:, half:]),
        )  # fmt: skip
