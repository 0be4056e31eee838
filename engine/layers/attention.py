"""Paged attention over ragged rows: each row brings any number of new tokens after any number of cached ones.

Suffixes: T tokens, B rows of a bucket, Q new tokens per row, H query heads, K key-value heads, G = H/K query heads
sharing one, L cached tokens (padded), N blocks, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from engine.memory.cache import KVCache
from engine.models.spec import DecoderSpec

# Padded KV tokens that cost as much as the launches of one more bucket (measured on two cores at batch 16).
PADDING_TOKENS = 1024
# Scores of one bucket above which the product is not materialised any more but streamed by SDPA.
SCORE_ELEMENTS = 1 << 24


class Span(NamedTuple):
    """One row of a step: its new tokens are `offset .. offset + fresh` of the batch, at positions `start ..`."""

    offset: int
    start: int
    fresh: int
    table: NDArray[np.int64]


class Attention(Protocol):
    """A backend: plans once per step, then attends once per layer."""

    def plan(self, spans: Sequence[Span]) -> object:
        """What all layers of this step share."""

    def __call__(self, layer: int, q_THD: torch.Tensor, plan: object) -> torch.Tensor:
        """Attention output [T, H * D]; this step's keys and values are already in the cache.

        A token of a layer with window w = spec.windows[layer] > 0 sees the last w tokens, itself included.
        """


@dataclass(frozen=True)
class Bucket:
    """Rows with the same number of new tokens and similar lengths, attended in one batched product."""

    rows: int
    fresh: int
    tokens: slice | torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor


class GatherAttention:
    """Gathers pages, then multiplies with the query groups folded into rows: any device, any dtype.

    A plan holds the buckets of every window some layer has; pages wholly before a row's window are not gathered.
    """

    def __init__(self, spec: DecoderSpec, cache: KVCache, device: torch.device, dtype: torch.dtype) -> None:
        self._spec, self._cache, self._device, self._dtype = spec, cache, device, dtype
        self._group = spec.heads // spec.kv_heads
        self._scale = spec.head_dim**-0.5
        self._windows = sorted(set(spec.windows))

    def plan(self, spans: Sequence[Span]) -> dict[int, list[Bucket]]:
        """Buckets of the step by window; see PADDING_TOKENS for when rows share one."""
        return {window: self._buckets(spans, window) for window in self._windows}

    def __call__(self, layer: int, q_THD: torch.Tensor, plan: object) -> torch.Tensor:
        assert isinstance(plan, dict)
        buckets: list[Bucket] = plan[self._spec.windows[layer]]
        if len(buckets) == 1 and isinstance(buckets[0].tokens, slice):
            return self._attend(layer, q_THD, buckets[0])
        out_TA = q_THD.new_empty(q_THD.shape[0], self._spec.attention_size)
        for bucket in buckets:
            out_TA[bucket.tokens] = self._attend(layer, q_THD[bucket.tokens], bucket)
        return out_TA

    def _buckets(self, spans: Sequence[Span], window: int) -> list[Bucket]:
        if window:
            spans = [windowed(span, window, self._cache.block_size) for span in spans]
        return [self._bucket(members, window) for members in grouped(spans)]

    def _bucket(self, members: Sequence[Span], window: int) -> Bucket:
        fresh = members[0].fresh
        blocks = max(self._cache_blocks(span) for span in members)
        tables = torch.from_numpy(np.stack([_pages(span, blocks) for span in members])).to(self._device)
        starts = torch.tensor([span.start for span in members], device=self._device)
        return Bucket(
            rows=len(members),
            fresh=fresh,
            tokens=_tokens(members, self._device),
            pages=self._cache.gather_index(tables),
            mask=self._mask(starts, fresh, blocks * self._cache.block_size, window),
        )

    def _cache_blocks(self, span: Span) -> int:
        return -(-(span.start + span.fresh) // self._cache.block_size)

    def _mask(self, starts_B: torch.Tensor, fresh: int, length: int, window: int) -> torch.Tensor:
        """[B * K, Q * G, L]: 0 where a query may look, minus infinity elsewhere."""
        positions_BQ = starts_B[:, None] + torch.arange(fresh, device=self._device)
        hidden_BQL = hidden(positions_BQ, torch.arange(length, device=self._device), window)
        mask_BQL = torch.zeros(hidden_BQL.shape, dtype=self._dtype, device=self._device)
        mask_BQL.masked_fill_(hidden_BQL, float("-inf"))
        shape = (len(starts_B), self._spec.kv_heads, fresh, self._group, length)
        return mask_BQL[:, None, :, None, :].expand(shape).reshape(-1, fresh * self._group, length)

    def _attend(self, layer: int, q_THD: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        spec, rows, fresh = self._spec, bucket.rows, bucket.fresh
        keys, values = self._cache.gather(layer, bucket.pages, rows)
        q = q_THD.reshape(rows, fresh, spec.kv_heads, self._group, spec.head_dim)
        if fresh > 1:
            q = q.transpose(1, 2)
        q = q.reshape(rows * spec.kv_heads, fresh * self._group, spec.head_dim)
        out = self._products(q, keys, values, bucket.mask)
        if fresh > 1:
            out = out.view(rows, spec.kv_heads, fresh, self._group, spec.head_dim).transpose(1, 2)
        return out.reshape(rows * fresh, spec.attention_size)

    def _products(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if mask.numel() > SCORE_ELEMENTS:
            # Three dimensions would take the slow math path.
            heads = [x.unsqueeze(0) for x in (q, keys, values, mask)]
            return functional.scaled_dot_product_attention(
                heads[0], heads[1], heads[2], attn_mask=heads[3], scale=self._scale
            ).squeeze(0)
        scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=self._scale)
        return torch.bmm(scores.softmax(-1), values)


def windowed(span: Span, window: int, block_size: int) -> Span:
    """The row without the pages that lie wholly before its first token's window; attention sees distances only."""
    skipped = max(0, span.start + 1 - window) // block_size
    return Span(span.offset, span.start - skipped * block_size, span.fresh, span.table[skipped:])


def hidden(positions_Q: torch.Tensor, places_L: torch.Tensor, window: int) -> torch.Tensor:
    """Whether queries at `positions` [..., Q] must not look at places [L]: later ones, and those before the window."""
    later = places_L > positions_Q[..., None]
    return later | (places_L <= positions_Q[..., None] - window) if window else later


def grouped(spans: Sequence[Span]) -> list[list[Span]]:
    """Rows that attend together: the same `fresh`, and lengths whose padding costs less than another launch."""
    groups: list[list[Span]] = []
    waste = 0
    for span in sorted(spans, key=lambda span: (span.fresh, span.start), reverse=True):
        if groups and groups[-1][0].fresh == span.fresh:
            padding = (groups[-1][0].start - span.start) * span.fresh
            if waste + padding <= PADDING_TOKENS:
                groups[-1].append(span)
                waste += padding
                continue
        groups.append([span])
        waste = 0
    return [sorted(group) for group in groups]


def _pages(span: Span, blocks: int) -> NDArray[np.int64]:
    """The row's first `blocks` pages; a table that was cut by a window is filled up with the null block."""
    table = span.table[:blocks]
    return table if len(table) == blocks else np.pad(table, (0, blocks - len(table)))


def _tokens(members: Sequence[Span], device: torch.device) -> slice | torch.Tensor:
    fresh = members[0].fresh
    first = members[0].offset
    if all(span.offset == first + index * fresh for index, span in enumerate(members)):
        return slice(first, first + fresh * len(members))
    offsets = torch.tensor([span.offset for span in members], device=device)
    return (offsets[:, None] + torch.arange(fresh, device=device)).reshape(-1)


def reference_attention(
    q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, start: int, window: int = 0
) -> torch.Tensor:
    """One row in fp32, head by head: what every backend is tested against. Queries sit at positions `start ..`."""
    fresh, heads, head_dim = q_THD.shape
    group = heads // k_LKD.shape[1]
    distance_QL = torch.arange(start, start + fresh)[:, None] - torch.arange(k_LKD.shape[0])[None, :]
    hidden_QL = (distance_QL < 0) | (distance_QL >= (window or k_LKD.shape[0]))
    out_QHD = torch.empty(fresh, heads, head_dim)
    for head in range(heads):
        k_LD, v_LD = k_LKD[:, head // group].float(), v_LKD[:, head // group].float()
        scores_QL = q_THD[:, head].float() @ k_LD.T / head_dim**0.5
        weights_QL = scores_QL.masked_fill(hidden_QL, float("-inf")).softmax(-1)
        out_QHD[:, head] = weights_QL @ v_LD
    return out_QHD.reshape(fresh, heads * head_dim)
