"""A sparse mixture of experts: tokens are sorted by expert, and every expert in use multiplies its tokens once.

Suffixes: T tokens, K experts chosen per token, X experts, E hidden size, N = T * K (token, expert) pairs.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from engine.layers.linear import Linear
from engine.models.spec import MoeSpec


def route(logits_TX: torch.Tensor, spec: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (fp32) and numbers of each token's experts, both [T, K], most likely first."""
    weights_TK, experts_TK = logits_TX.float().softmax(-1).topk(spec.per_token, dim=-1)
    if spec.normalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, experts_TK


class MoeLayer:
    """Router and experts of one layer. `gate_up[x]` is [2I, E] with the gate first, `down[x]` [E, I]."""

    def __init__(
        self,
        spec: MoeSpec,
        router_XE: torch.Tensor,
        gate_up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        *,
        pack: bool = True,
    ) -> None:
        self.spec = spec
        self.router = Linear(router_XE, pack=pack)
        self.gate_up = [Linear(weight, pack=pack) for weight in gate_up]
        self.down = [Linear(weight, pack=pack) for weight in down]

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        """[T, E]. A token's result does not depend on the tokens beside it."""
        weights_TK, experts_TK = route(self.router(x_TE), self.spec)
        order_N = experts_TK.view(-1).argsort(stable=True)
        sorted_NE = x_TE[order_N // self.spec.per_token]
        counts = experts_TK.view(-1).bincount(minlength=self.spec.experts).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                sorted_NE[start : start + count] = self._expert(expert, sorted_NE[start : start + count])
                start += count
        # Back in token order, so that a token's experts are always added in the same order, with no atomics.
        y_NE = torch.empty_like(sorted_NE)
        y_NE[order_N] = sorted_NE
        y_TKE = y_NE.view(*experts_TK.shape, x_TE.shape[-1]) * weights_TK.unsqueeze(-1)
        return y_TKE.sum(1).to(x_TE.dtype)

    def _expert(self, expert: int, x_TE: torch.Tensor) -> torch.Tensor:
        gate_T, up_T = self.gate_up[expert](x_TE).chunk(2, dim=-1)
        return self.down[expert](functional.silu(gate_T).mul_(up_T))


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
