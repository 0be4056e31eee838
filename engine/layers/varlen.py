"""Paged flash attention on CUDA, through torch's own `varlen_attn_out`: no gathering, any number of tokens per row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn_out

from engine.layers.attention import Attention, Span
from engine.memory.cache import KVCache
from engine.models.spec import DecoderSpec


@dataclass(frozen=True)
class VarlenPlan:
    """int32 on the device: cumulative query lengths [B + 1], key lengths [B], block tables [B, N]."""

    queries: torch.Tensor
    keys: torch.Tensor
    tables: torch.Tensor
    longest_query: int
    longest_key: int


class VarlenAttention:
    """Flash attention over pages, causal and aligned at the end, so verify rows are rows like any other."""

    def __init__(self, spec: DecoderSpec, cache: KVCache, device: torch.device) -> None:
        self._spec, self._cache, self._device = spec, cache, device

    def plan(self, spans: Sequence[Span]) -> VarlenPlan:
        """Lengths and block tables of the step."""
        lengths = [span.start + span.fresh for span in spans]
        blocks = -(-max(lengths) // self._cache.block_size)
        tables = np.stack([span.table[:blocks] for span in spans]).astype(np.int32)
        return VarlenPlan(
            queries=self._int32([0, *accumulate(span.fresh for span in spans)]),
            keys=self._int32(lengths),
            tables=torch.from_numpy(tables).to(self._device),
            longest_query=max(span.fresh for span in spans),
            longest_key=max(lengths),
        )

    def __call__(self, layer: int, q_THD: torch.Tensor, plan: object) -> torch.Tensor:
        assert isinstance(plan, VarlenPlan)
        keys, values = self._cache.paged(layer)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        varlen_attn_out(
            out_THD,
            q_THD,
            keys,
            values,
            plan.queries,
            None,
            plan.longest_query,
            plan.longest_key,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=plan.keys,
            block_table=plan.tables,
            num_splits=1,  # pytorch#194167: paged split-KV can leave rows unwritten; one split is batch-invariant too
        )
        return out_THD.view(-1, self._spec.attention_size)

    def _int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def agree(candidate: Attention, trusted: Attention, spec: DecoderSpec, cache: KVCache, device: torch.device) -> bool:
    """Whether two backends give the same attention on random pages: a row of one token, a chunk, a fresh prompt.

    Run at start-up, before anything is cached; the pages are zeroed again.
    """
    size, dtype = cache.block_size, cache.dtype
    generator = torch.Generator().manual_seed(0)
    lengths = [(2 * size - 1, 1), (size // 2, 7), (0, size)]
    table = np.arange(1, 3, dtype=np.int64)
    offsets = [0, *accumulate(fresh for _, fresh in lengths)]
    spans = [Span(offset, start, fresh, table) for offset, (start, fresh) in zip(offsets, lengths, strict=False)]
    slots = torch.arange(size, 3 * size, device=device)
    kv = torch.randn(2 * size, 2 * spec.kv_heads, spec.head_dim, generator=generator).to(device, dtype)
    q = torch.randn(offsets[-1], spec.heads, spec.head_dim, generator=generator).to(device, dtype)
    cache.write(0, kv, cache.write_index(slots))
    try:
        found, wanted = candidate(0, q, candidate.plan(spans)), trusted(0, q, trusted.plan(spans))
        return bool(torch.allclose(found.float(), wanted.float(), atol=0.03, rtol=0.03))
    finally:
        cache.write(0, torch.zeros_like(kv), cache.write_index(slots))
