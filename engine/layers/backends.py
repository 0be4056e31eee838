"""Which attention runs where."""

import torch

from engine.layers.attention import Attention, GatherAttention
from engine.layers.varlen import VarlenAttention, agree
from engine.memory.cache import KVCache
from engine.models.spec import DecoderSpec


def choose_attention(spec: DecoderSpec, cache: KVCache, device: torch.device) -> Attention:
    """Paged flash attention on a GPU in half precision, gathering everywhere else.

    Raises RuntimeError when the GPU's kernel gives wrong results: a wrong answer is worse than no start.
    """
    gather = GatherAttention(spec, cache, device, cache.dtype)
    if device.type != "cuda" or cache.dtype == torch.float32:
        return gather
    varlen = VarlenAttention(spec, cache, device)
    if not agree(varlen, gather, spec, cache, device):
        raise RuntimeError("this GPU's paged flash attention disagrees with plain attention; run with --precision fp32")
    return varlen
