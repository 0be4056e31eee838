"""A mixture's weights under every name transformers writes."""

import torch

from engine.layers.moe import MoeLayer
from engine.models.loading import Checkpoint
from engine.models.spec import MoeSpec

# Module and (gate, down, up) names: Qwen's, and Mixtral's own; fused tensors lie under Qwen's module name for both.
QWEN, MIXTRAL = ("mlp", ("gate_proj", "down_proj", "up_proj")), ("block_sparse_moe", ("w1", "w2", "w3"))


def load_experts(
    checkpoint: Checkpoint, layer: str, spec: MoeSpec, hidden: int, device: torch.device, pack: bool
) -> MoeLayer:
    """The mixture of the layer with this prefix. Raises UnsupportedModel when weights are missing or misshapen."""
    module, names = MIXTRAL if f"{layer}.block_sparse_moe.gate.weight" in checkpoint else QWEN
    owner = f"{layer}.{module}"
    router = checkpoint.take(f"{owner}.gate.weight", spec.experts, hidden).to(device)
    if f"{owner}.experts.gate_up_proj" in checkpoint:
        gate_up, down = _fused(checkpoint, f"{owner}.experts", spec, hidden)
    else:
        gate_up, down = _separate(checkpoint, f"{owner}.experts", names, spec, hidden)
    return MoeLayer(spec, router, [w.to(device) for w in gate_up], [w.to(device) for w in down], pack=pack)


def _fused(
    checkpoint: Checkpoint, owner: str, spec: MoeSpec, hidden: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One tensor for all experts, as transformers 5 keeps them in memory."""
    gate_up = checkpoint.take(f"{owner}.gate_up_proj", spec.experts, 2 * spec.intermediate_size, hidden)
    down = checkpoint.take(f"{owner}.down_proj", spec.experts, hidden, spec.intermediate_size)
    return list(gate_up.unbind()), list(down.unbind())


def _separate(
    checkpoint: Checkpoint, owner: str, names: tuple[str, str, str], spec: MoeSpec, hidden: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    wide = spec.intermediate_size
    gate_up, down = [], []
    for expert in range(spec.experts):
        gate, narrow, up = (f"{owner}.{expert}.{name}.weight" for name in names)
        gate_up.append(torch.cat((checkpoint.take(gate, wide, hidden), checkpoint.take(up, wide, hidden))))
        down.append(checkpoint.take(narrow, hidden, wide))
    return gate_up, down
