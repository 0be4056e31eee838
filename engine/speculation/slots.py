"""Slot tensors of the heads: allocated once, filled in place between two steps. Slot 0 drafts nothing.

Suffixes: S slots (0 included), K heads, E hidden size, V pruned vocabulary, C tables of the conditioning.
"""

from typing import NamedTuple

import torch

from engine.speculation.loading import Limits, Speculator


class Ready(NamedTuple):
    """A speculator brought into the layout of a slot; made in any thread, so that filling only copies."""

    speculator: Speculator
    parts: dict[str, torch.Tensor]


class SlotTensors:
    """What torch drafts from. Addresses never change after the first `fill`, so a captured graph may read them.

    `places_ST` is a token's row in its slot's pruned vocabulary (the row behind the last where it has none).
    """

    def __init__(self, limits: Limits, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.limits, self.total = limits, slots
        self.dtype, self.device = dtype, device
        self.heads = [0] * (slots + 1)
        self._made = False

    def prepare(self, speculator: Speculator) -> Ready:
        """Everything that takes time; touches no slot."""
        parts = {
            "tokens": speculator.tokens_V.long(),
            "places": places(speculator, self.limits.tokens),
            "weight": speculator.weight_KEE.to(self.dtype),
            "head": speculator.head_VE.to(self.dtype),
        }
        if speculator.condition_CVE is not None:
            parts["condition"] = speculator.condition_CVE.to(self.dtype)
        return Ready(speculator, parts)

    def fill(self, slot: int, ready: Ready) -> None:
        """Copy prepared heads into a slot, between two steps; what the slot held is gone."""
        self._make()
        speculator, parts = ready
        heads, words = speculator.heads, speculator.vocabulary
        self.tokens_SV[slot].zero_()[:words].copy_(parts["tokens"])
        self.places_ST[slot].copy_(parts["places"])
        self.outside_SV[slot].fill_(True)[:words].fill_(False)
        self.weight_SKEE[slot, :heads].copy_(parts["weight"])
        self.bias_SKE[slot, :heads].copy_(speculator.bias_KE)
        self.head_SVE[slot].zero_()[:words].copy_(parts["head"])
        self.confidence_SKF[slot, :heads].copy_(speculator.confidence_KF)
        self.confidence_bias_SK[slot, :heads].copy_(speculator.confidence_bias_K)
        if "condition" in parts:
            tables = len(parts["condition"])
            self.condition_SCVE[slot, :tables, : words + 1].copy_(parts["condition"])
            self.table_SK[slot].copy_(torch.arange(self.limits.heads).clamp_max(tables - 1))
        self.conditioned_S[slot] = "condition" in parts
        self.recurrent_S[slot] = speculator.recurrent
        self.heads[slot] = heads

    def clear(self, slot: int) -> None:
        """Nothing is drafted from this slot until it is filled again."""
        self.heads[slot] = 0

    def _make(self) -> None:
        """At the first load: an engine that never drafts with heads must not pay gigabytes of a GPU for them."""
        if self._made:
            return
        slots, limits = self.total + 1, self.limits
        heads, hidden, words = limits.heads, limits.hidden, limits.vocabulary

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.tokens_SV = zeros(slots, words, dtype=torch.int64)
        self.places_ST = zeros(slots, limits.tokens, dtype=torch.int32)
        self.outside_SV = zeros(slots, words, dtype=torch.bool)
        self.weight_SKEE = zeros(slots, heads, hidden, hidden, dtype=self.dtype)
        self.bias_SKE = zeros(slots, heads, hidden)
        self.condition_SCVE = zeros(slots, heads, words + 1, hidden, dtype=self.dtype)
        self.table_SK = zeros(slots, heads, dtype=torch.int64)
        self.head_SVE = zeros(slots, words, hidden, dtype=self.dtype)
        self.confidence_SKF = zeros(slots, heads, hidden + 1)
        self.confidence_bias_SK = zeros(slots, heads)
        self.conditioned_S = zeros(slots, dtype=torch.bool)
        self.recurrent_S = zeros(slots, dtype=torch.bool)
        self._made = True


def places(speculator: Speculator, tokens: int) -> torch.Tensor:
    """For every token of the model its row in the pruned vocabulary; the row behind the last where it has none."""
    places_T = torch.full((tokens,), speculator.vocabulary, dtype=torch.int32)
    places_T[speculator.tokens_V.long()] = torch.arange(speculator.vocabulary, dtype=torch.int32)
    return places_T
