"""LoRA added to a batch whose rows use different adapters.

A fused projection has one pair of slot tensors: the A matrices of its parts stacked, B block-diagonal, so that one
product pair serves all parts. Suffixes: S slots, R stacked ranks, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

# Above this many runs of equal slots, gathering every token's matrices beats a product pair per run.
MAX_RUNS = 12
# On CPU, runs up to this length are multiplied in fp32 as stored: oneDNN's bf16 products of one token cost three times
# as much (31 against 10 microseconds a pair); longer ones are converted first.
MAX_PRECISE_TOKENS = 16
# Gathering copies a token's matrices and reads the copy: about three reads of one slot, against one read of every slot.
GATHER_READS = 3


class Run(NamedTuple):
    """Tokens `start .. stop` of the batch use the adapter in `slot` (never 0)."""

    start: int
    stop: int
    slot: int


class LoraBatch(NamedTuple):
    """Which tokens use which slot; `slots_T` is set when there are too many runs to visit one by one.

    A `static` batch is read from `slots_T` on the device alone: the launches depend on no slot number, only on shapes,
    so a captured CUDA graph stays right when adapters come, go or change rows.
    """

    runs: tuple[Run, ...]
    slots_T: torch.Tensor | None = None
    static: bool = False


class LoraWeights:
    """Slot tensors of one fused projection: fixed buffers, written in place by `engine.adapters.slots` only.

    fp32 on CPU whatever the model computes in, the model's dtype on a GPU.
    """

    def __init__(
        self, slots: int, ranks: int, in_size: int, out_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        stored = torch.float32 if device.type == "cpu" else dtype
        self.a_SRI = torch.zeros(slots, ranks, in_size, dtype=stored, device=device)
        self.b_SRO = torch.zeros(slots, ranks, out_size, dtype=stored, device=device)
        self.width = [0] * slots
        self._numbers_S1 = torch.arange(1, slots, device=device).unsqueeze(1)

    def fill(self, slot: int, a_RI: torch.Tensor, b_RO: torch.Tensor) -> None:
        """Copy one adapter's stacked matrices in; the ranks it does not use contribute nothing."""
        used = a_RI.shape[0]
        self.a_SRI[slot, :used].copy_(a_RI)
        self.b_SRO[slot, :used].copy_(b_RO)
        self.b_SRO[slot, used:].zero_()
        self.width[slot] = used

    def add_(self, out_TO: torch.Tensor, x_TI: torch.Tensor, batch: LoraBatch) -> None:
        """out += B A x for every token that has an adapter."""
        if batch.static:
            assert batch.slots_T is not None, "a static batch is its slots"
            self._add_static(out_TO, x_TI, batch.slots_T)
            return
        if batch.slots_T is not None:
            self._add_gathered(out_TO, x_TI, batch.slots_T)
            return
        for start, stop, slot in batch.runs:
            width = self.width[slot]
            if width:
                a_RI, b_RO = self.a_SRI[slot, :width], self.b_SRO[slot, :width]
                self._add_run(out_TO[start:stop], x_TI[start:stop], a_RI, b_RO)

    def _add_run(self, out_TO: torch.Tensor, x_TI: torch.Tensor, a_RI: torch.Tensor, b_RO: torch.Tensor) -> None:
        if len(x_TI) > MAX_PRECISE_TOKENS:
            a_RI, b_RO = a_RI.to(x_TI.dtype), b_RO.to(x_TI.dtype)
        out_TO += functional.linear(x_TI.to(a_RI.dtype), a_RI) @ b_RO

    def _add_static(self, out_TO: torch.Tensor, x_TI: torch.Tensor, slots_T: torch.Tensor) -> None:
        """All adapters at once, each token keeping its own: two plain products, without a copy of any matrix.

        Slot 0 is left out of the products, so tokens without an adapter keep nothing.
        """
        if GATHER_READS * len(x_TI) < len(self._numbers_S1):
            self._add_gathered(out_TO, x_TI, slots_T)
            return
        low_TX = functional.linear(x_TI.to(self.a_SRI.dtype), self.a_SRI[1:].flatten(0, 1))
        low_TSR = low_TX.view(len(x_TI), len(self._numbers_S1), -1)
        others_TS1 = slots_T[:, None, None] != self._numbers_S1
        # Filled, not multiplied by zero: what a foreign adapter makes of this token may overflow.
        kept_TX = low_TSR.masked_fill(others_TS1, 0.0).flatten(1)
        out_TO += kept_TX @ self.b_SRO[1:].flatten(0, 1)

    def _add_gathered(self, out_TO: torch.Tensor, x_TI: torch.Tensor, slots_T: torch.Tensor) -> None:
        low_TR1 = torch.bmm(self.a_SRI[slots_T], x_TI.to(self.a_SRI.dtype).unsqueeze(2))
        out_TO += torch.bmm(low_TR1.transpose(1, 2), self.b_SRO[slots_T]).squeeze(1)


def lora_batch(slots: Sequence[int], counts: Sequence[int], device: torch.device) -> LoraBatch | None:
    """For rows in order, each of `counts[i]` tokens with slot `slots[i]`. None when no row has an adapter."""
    runs: list[Run] = []
    offset = 0
    for slot, count in zip(slots, counts, strict=True):
        if runs and runs[-1].slot == slot and runs[-1].stop == offset:
            runs[-1] = Run(runs[-1].start, offset + count, slot)
        elif slot and count:
            runs.append(Run(offset, offset + count, slot))
        offset += count
    if not runs:
        return None
    if len(runs) <= MAX_RUNS:
        return LoraBatch(tuple(runs))
    index = torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts)).to(device)
    # Gathering for a GPU-sized prompt would copy gigabytes; the fixed-shape products copy nothing.
    return LoraBatch(tuple(runs), index, static=device.type == "cuda")
