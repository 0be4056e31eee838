"""A sparse mixture of experts: tokens are sorted by expert, and every expert in use multiplies its tokens once.

Suffixes: T tokens, K experts chosen per token, X experts, E hidden size, I intermediate size, N = T * K (token, expert)
pairs sorted by expert; `ends_X` is where each expert's pairs end, int32.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn import functional

from engine.layers.linear import Linear
from engine.models.spec import MoeSpec

# Rows of 16 bytes are what torch's grouped product on a GPU asks for: 8 elements in half precision.
GROUPED_SIZE = 8


def route(logits_TX: torch.Tensor, spec: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (fp32) and numbers of each token's experts, both [T, K], most likely first."""
    weights_TK, experts_TK = logits_TX.float().softmax(-1).topk(spec.per_token, dim=-1)
    if spec.normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, experts_TK


class SeparateExperts:
    """One pair of linear layers per expert, packed where the CPU can; waits for the counts, so not for CUDA graphs."""

    def __init__(self, gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], *, pack: bool) -> None:
        self.gate_up = [Linear(weight, pack=pack) for weight in gate_up]
        self.down = [Linear(weight, pack=pack) for weight in down]

    def __call__(self, x_NE: torch.Tensor, ends_X: torch.Tensor) -> torch.Tensor:
        y_NE = torch.empty_like(x_NE)
        for expert, (start, end) in enumerate(pairwise((0, *ends_X.tolist()))):
            if end > start:
                y_NE[start:end] = self.down[expert](_gated(self.gate_up[expert](x_NE[start:end])))
        return y_NE


class StackedExperts:
    """All experts in one grouped product each way: few launches and no waiting for the counts."""

    def __init__(self, gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor]) -> None:
        self._gate_up_XEI = torch.stack(list(gate_up)).transpose(1, 2)
        self._down_XIE = torch.stack(list(down)).transpose(1, 2)

    def __call__(self, x_NE: torch.Tensor, ends_X: torch.Tensor) -> torch.Tensor:
        gated_NI = _gated(functional.grouped_mm(x_NE, self._gate_up_XEI, offs=ends_X))
        return functional.grouped_mm(gated_NI, self._down_XIE, offs=ends_X)


class MoeLayer:
    """Router and experts of one layer. `gate_up[x]` is [2I, E] with the gate first, `down[x]` [E, I].

    `stacked` chooses grouped products; by default on a GPU, if the sizes suit its kernel.
    """

    def __init__(
        self,
        spec: MoeSpec,
        router_XE: torch.Tensor,
        gate_up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        *,
        pack: bool = True,
        stacked: bool | None = None,
    ) -> None:
        self.spec = spec
        self.router = Linear(router_XE, pack=pack)
        if stacked is None:
            aligned = not (spec.intermediate_size % GROUPED_SIZE or router_XE.shape[1] % GROUPED_SIZE)
            stacked = router_XE.device.type == "cuda" and aligned
        self.experts = StackedExperts(gate_up, down) if stacked else SeparateExperts(gate_up, down, pack=pack)
        self._numbers_X = torch.arange(spec.experts, device=router_XE.device)

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        """[T, E]. A token's result does not depend on the tokens beside it."""
        weights_TK, experts_TK = route(self.router(x_TE), self.spec)
        sorted_N, order_N = experts_TK.view(-1).sort(stable=True)
        ends_X = torch.searchsorted(sorted_N, self._numbers_X, right=True).int()
        sorted_NE = self.experts(x_TE[order_N // self.spec.per_token], ends_X)
        # Back in token order, so that a token's experts are always added in the same order, with no atomics.
        y_NE = torch.empty_like(sorted_NE)
        y_NE[order_N] = sorted_NE
        y_TKE = y_NE.view(*experts_TK.shape, x_TE.shape[-1]) * weights_TK.unsqueeze(-1)
        return y_TKE.sum(1).to(x_TE.dtype)


def _gated(gate_up_N: torch.Tensor) -> torch.Tensor:
    gate_NI, up_NI = gate_up_N.chunk(2, dim=-1)
    return functional.silu(gate_NI).mul_(up_NI)


def reference_moe(
    x_TE: torch.Tensor,
    router_XE: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    spec: MoeSpec,
) -> torch.Tensor:
    """The same in fp32, token by token and expert by expert: what MoeLayer is tested against."""
    out_TE = torch.zeros(x_TE.shape)
    for token, x_E in enumerate(x_TE.float()):
        probabilities_X = (router_XE.float() @ x_E).softmax(-1)
        chosen = sorted(range(spec.experts), key=lambda expert: -float(probabilities_X[expert]))[: spec.per_token]
        total = sum(float(probabilities_X[expert]) for expert in chosen) if spec.normalize else 1.0
        for expert in chosen:
            gate_I, up_I = (gate_up[expert].float() @ x_E).chunk(2)
            y_E = down[expert].float() @ (functional.silu(gate_I) * up_I)
            out_TE[token] += y_E * (float(probabilities_X[expert]) / total)
    return out_TE
