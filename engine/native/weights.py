"""Weights and adapters in the native path's own layout. Every tensor made here is kept alive by its owner.

Suffixes: O outputs, I inputs, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.native.library import KINDS, PANEL, PARTS, Int, Lora, Matrix, functions
from engine.native.memory import Arena


def padded(size: int) -> int:
    """The next multiple of a panel."""
    return -(-size // PANEL) * PANEL


def pad(matrix_OI: torch.Tensor) -> torch.Tensor:
    """Zero rows and columns up to whole panels."""
    rows, columns = (padded(size) - size for size in matrix_OI.shape)
    return torch.nn.functional.pad(matrix_OI, (0, columns, 0, rows)) if rows or columns else matrix_OI


def pack(matrix_OI: torch.Tensor, arena: Arena | None = None) -> torch.Tensor:
    """A copy in panels of sixteen outputs; see matmul.h. Outputs in whole panels, inputs in whole units."""
    dense = matrix_OI.contiguous()
    out = arena.zeros(dense.shape, dense.dtype) if arena else torch.empty_like(dense)
    functions().whet_pack(dense.data_ptr(), out.data_ptr(), *dense.shape, dense.element_size())
    return out


def interleave(gate_up_OI: torch.Tensor) -> torch.Tensor:
    """Gate and up rows, each whole panels, alternating panel by panel: silu(gate) · up needs both at once."""
    gate, up = (half.reshape(-1, PANEL, half.shape[1]) for half in gate_up_OI.chunk(2))
    return torch.stack((gate, up), dim=1).flatten(0, 2)


def quantize(matrix_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 rows and the fp32 scale of each: the largest weight of an output becomes 127."""
    wide = matrix_OI.float()
    scale_O = wide.abs().amax(dim=1).clamp_min(1e-12) / 127
    return (wide / scale_O[:, None]).round().to(torch.int8), scale_O


@dataclass
class Packed:
    """A packed matrix and the tensors it points to."""

    matrix: Matrix
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, arena: Arena, *, int8: bool) -> "Packed":
        """From a dense weight whose sizes are whole panels."""
        tensors, scale = [], None
        if int8:
            weight_OI, scale = quantize(weight_OI)
            tensors.append(scale)
        data = pack(weight_OI, arena)
        tensors.append(data)
        bias = None
        if bias_O is not None:
            bias = torch.zeros(weight_OI.shape[0])
            bias[: len(bias_O)] = bias_O.float()
            tensors.append(bias)
        matrix = Matrix(
            data=data.data_ptr(),
            scale=None if scale is None else scale.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            outputs=weight_OI.shape[0],
            inputs=weight_OI.shape[1],
            kind=KINDS[data.dtype],
        )
        return cls(matrix, tensors)


class NativeLora:
    """Slot tensors of one fused projection, laid out as lora.h reads them.

    `parts` are the output sizes of what was fused; each part has ranks of its own, so B holds no zeros between parts.
    """

    def __init__(
        self,
        slots: int,
        rank: int,
        in_size: int,
        parts: Sequence[int],
        dtype: torch.dtype,
        arena: Arena,
        *,
        interleaved: bool = False,
    ) -> None:
        self._parts, self._inputs, self._interleaved = tuple(parts), padded(in_size), interleaved
        self._panels = [padded(size) // PANEL for size in parts]
        most = _even(rank)
        self._a = arena.zeros((slots, padded(len(parts) * most) * self._inputs), dtype)
        self._b = arena.zeros((slots, sum(self._panels) * PANEL * most), dtype)
        self._width = torch.zeros(slots, dtype=torch.int32)

    def fill(self, slot: int, a_RI: torch.Tensor, b_RO: torch.Tensor) -> None:
        """Copy one adapter's stacked matrices in. Ranks that touch no output of a part are left out of it."""
        split = self._split(b_RO)
        width = _even(max(len(ranks) for ranks, _ in split))
        self._width[slot] = width
        if not width:
            return
        a = torch.zeros(padded(len(split) * width), self._inputs)
        lifts = []
        for index, (ranks, columns) in enumerate(split):
            a[index * width : index * width + len(ranks), : a_RI.shape[1]] = a_RI[ranks].float()
            b = torch.zeros(self._panels[index] * PANEL, width)
            b[: self._parts[index], : len(ranks)] = b_RO[ranks, columns].float().T
            lifts.append(pack(b.to(self._b.dtype)).view(-1))
        packed = pack(a.to(self._a.dtype)).view(-1)
        self._a[slot, : len(packed)].copy_(packed)
        self._b[slot, : sum(map(len, lifts))].copy_(torch.cat(lifts))

    def structure(self) -> Lora:
        """What the library reads; valid while this object lives."""
        count = len(self._parts)
        starts = range(count) if self._interleaved else [sum(self._panels[:index]) for index in range(count)]
        return Lora(
            a=self._a.data_ptr(),
            b=self._b.data_ptr(),
            a_bytes=self._a.stride(0) * self._a.element_size(),
            b_bytes=self._b.stride(0) * self._b.element_size(),
            width=self._width.data_ptr(),
            parts=count,
            inputs=self._inputs,
            first=(Int * PARTS)(*starts),
            panels=(Int * PARTS)(*self._panels),
            spacing=2 if self._interleaved else 1,
        )

    def _split(self, b_RO: torch.Tensor) -> list[tuple[torch.Tensor, slice]]:
        """For each part: the ranks it uses and its columns of B."""
        found, start = [], 0
        for size in self._parts:
            columns = slice(start, start + size)
            found.append((torch.nonzero(b_RO[:, columns].any(dim=1)).squeeze(1), columns))
            start += size
        return found


def _even(rank: int) -> int:
    """Two bf16 ranks make a unit."""
    return rank + rank % 2
