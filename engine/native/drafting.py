"""Drafting with heads in one C++ call (speculator.h); the reference is TorchDrafter of engine/speculation/heads.py.

Suffixes: K heads, E hidden size, V pruned vocabulary, W the same in whole panels.
"""

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch

from engine.layers.sampler import MASK
from engine.native.decoder import NativeDecoder
from engine.native.library import KINDS, Int, Matrix, Pointer, functions
from engine.native.memory import Arena
from engine.native.weights import pack, pad, padded
from engine.speculation.heads import Ask, Guess
from engine.speculation.loading import Limits, Speculator
from engine.speculation.slots import Ready, places

# Between what rounding took from a row and a state there is no relation: in E dimensions their product deviates by 1/√E
# of their lengths' product, and the difference of two logits by √2 times that. So this is four deviations.
SIGMAS = 6.0
# Rows have seven bits, states eight: two products of theirs fit sixteen.
LARGEST = 63
# DraftAsk in speculator.h: Draw, then slot, token, most and a filler.
ASK = struct.Struct("=QqqfffiiiiI")
MOST_TOP_K = (1 << 31) - 1


class HeadSlot(ctypes.Structure):
    """One slot; `heads` 0 drafts nothing."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("weight", ctypes.POINTER(Matrix)), ("condition", Pointer), ("head", Pointer), ("coarse", Pointer),
        ("scale", Pointer), ("shift", Pointer), ("tokens", Pointer), ("places", Pointer), ("confidence", Pointer),
        ("confidence_last", Pointer), ("confidence_bias", Pointer),
        ("error", ctypes.c_float), ("length", ctypes.c_float),
        ("heads", Int), ("vocabulary", Int), ("tables", Int), ("recurrent", Int), ("bf16", Int),
    ]  # fmt: skip


class DraftJob(ctypes.Structure):
    """One call."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("slots", ctypes.POINTER(HeadSlot)), ("asks", Pointer), ("hidden", Pointer), ("tokens", Pointer),
        ("counts", Pointer), ("chances", Pointer), ("state", Pointer), ("lifted", Pointer), ("logits", Pointer),
        ("units", Pointer), ("whole", Pointer), ("scratch", Pointer), ("survival", Pointer), ("shrink", Pointer),
        ("row", Pointer), ("place", Pointer),
        ("rows", Int), ("width", Int), ("stride", Int), ("last_slot", Int), ("vocabulary", Int),
        ("floor", ctypes.c_float),
    ]  # fmt: skip


class NativeDrafter:
    """Slots in the library's layout, and buffers for as many rows as ever asked at once.

    A slot is a row of addresses: filling one costs a step nothing, and new pages were touched by whoever prepared it.
    """

    def __init__(self, decoder: NativeDecoder, limits: Limits, slots: int) -> None:
        self._decoder, self._limits = decoder, limits
        self._native = drafting_functions()
        self._held: dict[int, dict[str, torch.Tensor]] = {}
        self._slots = (HeadSlot * (slots + 1))()
        self._matrices = [(Matrix * limits.heads)() for _ in range(slots + 1)]
        self._room: list[torch.Tensor] = []
        self._rows = 0
        self._job = DraftJob(
            slots=self._slots,
            width=limits.hidden,
            stride=limits.heads,
            last_slot=slots,
            vocabulary=padded(limits.vocabulary),
        )

    def prepare(self, speculator: Speculator) -> Ready:
        """Pack and quantize; any thread."""
        dtype = self._dtype_of(speculator)
        head_WE = pad(speculator.head_VE.to(dtype).float())
        scale_W = head_WE.abs().amax(1).clamp_min(1e-12) / LARGEST
        coarse_WE = (head_WE / scale_W[:, None]).round().to(torch.int8)
        lost_W = (coarse_WE.float() * scale_W[:, None] - head_WE).norm(dim=1)
        parts = {
            "weight": torch.stack([pack(weight_EE.to(dtype)) for weight_EE in speculator.weight_KEE]),
            "bias": speculator.bias_KE,
            "head": head_WE.to(dtype),
            # Four elements of a row lie together, as if they were one of four bytes.
            "coarse": pack(coarse_WE.view(torch.float32)).view(torch.int8),
            "scale": scale_W,
            "shift": 128 * coarse_WE.sum(1, dtype=torch.int32),
            "error": lost_W.max() * (SIGMAS * self._limits.hidden**-0.5),
            # Rounding to whole numbers deviates by 1/√12.
            "length": head_WE.norm(dim=1).max() * (SIGMAS * 12**-0.5),
            "tokens": speculator.tokens_V,
            "places": places(speculator, self._limits.tokens),
            "confidence": speculator.confidence_KF[:, :-1],
            "confidence_last": speculator.confidence_KF[:, -1],
            "confidence_bias": speculator.confidence_bias_K,
        }
        if speculator.condition_CVE is not None:
            parts["condition"] = speculator.condition_CVE.to(dtype)
        arena = Arena()
        return Ready(speculator, {name: arena.copy(part) for name, part in parts.items()})

    def fill(self, slot: int, ready: Ready) -> None:
        """Point a slot at prepared heads, between two steps; what it held is let go."""
        speculator, parts = ready
        at = {name: part.data_ptr() for name, part in parts.items() if name not in ("error", "length")}
        hidden, dtype = self._limits.hidden, parts["weight"].dtype
        weight, bias, weights = at.pop("weight"), at.pop("bias"), self._matrices[slot]
        for head in range(speculator.heads):
            weights[head] = Matrix(
                data=weight + head * hidden * hidden * dtype.itemsize,
                bias=bias + head * hidden * 4,
                outputs=hidden,
                inputs=hidden,
                kind=KINDS[dtype],
            )
        self._slots[slot] = HeadSlot(
            weight=weights,
            error=float(parts["error"]),
            length=float(parts["length"]),
            heads=speculator.heads,
            vocabulary=speculator.vocabulary,
            tables=0 if speculator.condition_CVE is None else len(speculator.condition_CVE),
            recurrent=speculator.recurrent,
            bf16=dtype == torch.bfloat16,
            **at,
        )
        self._held[slot] = parts

    def clear(self, slot: int) -> None:
        """Draft nothing from a slot until it is filled again."""
        self._slots[slot].heads = 0
        self._held.pop(slot, None)

    def propose(self, hidden_RE: torch.Tensor, asks: Sequence[Ask], floor: float = 0.0) -> list[Guess]:
        """One draft per ask; see TorchDrafter."""
        rows = len(asks)
        if rows > self._rows:
            self._grow(max(rows, 2 * self._rows))
        written = self._asks
        for index, (slot, token, draw, most) in enumerate(asks):
            sampling = draw.sampling
            ASK.pack_into(
                written, index * ASK.size, sampling.seed & MASK, draw.choice, draw.position, sampling.temperature,
                sampling.top_p, sampling.min_p, min(sampling.top_k, MOST_TOP_K), slot, token, most, 0,
            )  # fmt: skip
        if hidden_RE.dtype != torch.float32 or not hidden_RE.is_contiguous():
            hidden_RE = hidden_RE.float().contiguous()
        job = self._job
        job.hidden, job.rows, job.floor = hidden_RE.data_ptr(), rows, floor
        self._native.whet_draft(self._decoder.handle, ctypes.byref(job))
        stride, tokens, chances = job.stride, self._tokens, self._chances
        return [
            Guess(tokens[at : at + count], chances[at : at + count])
            for at, count in zip(range(0, rows * stride, stride), self._counts[:rows], strict=True)
        ]

    def _dtype_of(self, speculator: Speculator) -> torch.dtype:
        """What its matrices are kept in: the engine's dtype, or bf16 where they came so and nothing is lost by it."""
        stored = (speculator.weight_KEE, speculator.head_VE, speculator.condition_CVE)
        halved = all(tensor is None or tensor.dtype == torch.bfloat16 for tensor in stored)
        return torch.bfloat16 if halved and self._native.whet_bf16_is_exact() else self._decoder.dtype

    def _grow(self, rows: int) -> None:
        """Room for `rows` rows. Asks are written to and drafts read from ctypes arrays: torch's would cost more."""
        limits, job = self._limits, self._job
        words = padded(limits.vocabulary)
        count = rows * limits.heads
        self._asks = bytearray(rows * ASK.size)
        self._tokens, self._counts = (Int * count)(), (Int * rows)()
        self._chances = (ctypes.c_float * count)()
        asks = (ctypes.c_char * len(self._asks)).from_buffer(self._asks)
        job.asks, job.tokens = ctypes.addressof(asks), ctypes.addressof(self._tokens)
        job.counts, job.chances = ctypes.addressof(self._counts), ctypes.addressof(self._chances)
        sizes = {
            "state": rows * limits.hidden, "lifted": rows * limits.hidden, "logits": rows * words,
            "units": rows * limits.hidden, "whole": rows * limits.hidden,
            "scratch": self._decoder.threads * 5 * (words + 32),
            "survival": rows, "shrink": rows, "row": rows, "place": rows,
        }  # fmt: skip
        arena = Arena()
        self._room = [arena.zeros((size,), torch.float32) for size in sizes.values()]
        for name, room in zip(sizes, self._room, strict=True):
            setattr(job, name, room.data_ptr())
        self._rows = rows


@cache
def drafting_functions() -> ctypes.CDLL:
    """The library with drafting's signature declared. Raises NoNative."""
    native = functions()
    native.whet_draft.restype = None
    native.whet_draft.argtypes = [Pointer, ctypes.POINTER(DraftJob)]
    return native
