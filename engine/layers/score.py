"""A classification head on pooled states, with an own weight matrix for every adapter that brings one.

Suffixes: S slots, L labels, E hidden size.
"""

import torch
from torch.nn import functional


class ScoreHead:
    """scores = W x. Slot 0 holds the base's weights, and so does the slot of an adapter that trained no head."""

    def __init__(self, weight_LE: torch.Tensor) -> None:
        self.weight_SLE = weight_LE.float().unsqueeze(0)

    def add_slots(self, slots: int) -> None:
        """Allocate heads 1 .. slots for adapters."""
        self.weight_SLE = self.weight_SLE[:1].repeat(slots + 1, 1, 1)

    def fill(self, slot: int, weight_LE: torch.Tensor | None, delta_LE: torch.Tensor | None = None) -> None:
        """Copy an adapter's head in, the base's where it has none; `delta_LE` is added to it."""
        self.weight_SLE[slot].copy_(self.weight_SLE[0] if weight_LE is None else weight_LE)
        if delta_LE is not None:
            self.weight_SLE[slot] += delta_LE.to(self.weight_SLE.device)

    def __call__(self, x_E: torch.Tensor, slot: int) -> torch.Tensor:
        """Raw scores [L] as fp32 of one pooled state under the adapter in `slot`."""
        return functional.linear(x_E.float(), self.weight_SLE[slot])
