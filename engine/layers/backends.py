"""Which attention runs where."""

import torch

from engine.layers.attention import Attention, GatherAttention
from engine.layers.varlen import CHECKED_BLOCKS, VarlenAttention, agree
from engine.memory.cache import KVCache
from engine.models.spec import DecoderSpec


def choose_attention(spec: DecoderSpec, cache: KVCache, device: torch.device) -> Attention:
    """Paged flash attention on a GPU in half precision, gathering everywhere else.

    Raises RuntimeError when the GPU's kernel gives wrong results, as a wrong answer is worse than no start, and
    ValueError when the cache is too small to find out.
    """
    gather = GatherAttention(spec, cache, device, cache.dtype)
    if device.type != "cuda" or cache.dtype == torch.float32:
        return gather
    if cache.blocks <= CHECKED_BLOCKS:
        raise ValueError(f"on a GPU --kv-tokens must be at least {CHECKED_BLOCKS * cache.block_size}")
    return _agreeing(gather, spec, cache, device)


def _agreeing(gather: Attention, spec: DecoderSpec, cache: KVCache, device: torch.device) -> VarlenAttention:
    """The first way of calling the installed kernel that it takes and answers rightly: FA2's, then FA3's."""
    objections: list[str] = []
    for key_offsets in (True, False):
        varlen = VarlenAttention(spec, cache, device, key_offsets=key_offsets)
        try:
            if agree(varlen, gather, spec, cache, device):
                return varlen
            objections.append("it disagrees with plain attention")
        except (RuntimeError, NotImplementedError) as refusal:
            # A kernel refuses arguments it was not built for with a plain RuntimeError; both sentences are reported.
            objections.append(str(refusal).splitlines()[0])
    raise RuntimeError(
        f"this GPU's paged flash attention cannot be used ({'; '.join(objections)}); try --precision fp32"
    )
