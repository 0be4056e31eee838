"""Paged flash attention on CUDA, through torch's own `varlen_attn_out`: no gathering, any number of tokens per row.

Read in torch 2.13.0's torch/nn/attention (varlen.py, _fa3.py) and, for FA2, in a main-branch flash_api.cpp that has
num_splits (wheels do not ship it). Nothing here has run on a GPU yet; the start-up check decides what is used.
- With a block table, keys and values are [N, P, K, D] pools (any strides, D contiguous), and `seqused_k` is required.
  Cumulative queries, `seqused_k` and tables are int32 on the device; a table row is as wide as `max_k` needs.
- FA2, the built-in kernel: P a multiple of 256, D a multiple of 8 up to 256, fp16 or bf16, compute capability 8.0.
- `window_size` (left, right) counts neighbours, itself not included: (W - 1, 0) sees the last W tokens. Causal masks
  are aligned at the end of the keys. `is_causal` is derived from (-1, 0) and nothing else.
- Never pass (-1, -1) for single tokens: FA2 then swaps query groups into rows and computes into a copy of `out`.
- `num_splits=1` turns split-KV off (pytorch#194167: paged split-KV can leave rows unwritten), and each row's result no
  longer depends on what else is in the batch.
- `max_q` sets the grid; `max_k` only bounds windows and splits, so a larger one changes nothing when splits are off.
- FA2's entry wants cumulative keys whenever it gets cumulative queries, though pages make it ignore them; FA3 refuses
  them beside a block table. Which one is registered is found by trying; see engine/layers/backends.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn_out

from engine.layers.attention import Attention, Span
from engine.memory.cache import KVCache
from engine.models.spec import DecoderSpec

Kernel = Callable[..., object]
# The start-up check's tolerance: bf16 rounds to 3 significant digits, and outputs are averages of unit normals.
AGREEMENT = 0.03
# Blocks that check writes and reads, beside the null block.
CHECKED_BLOCKS = 2


@dataclass(frozen=True)
class VarlenPlan:
    """int32 on the device: cumulative query lengths [B + 1], key lengths [B], their sums [B + 1], block tables [B, N].

    With `padded` some tokens belong to no row; their output is zero instead of whatever the memory held.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    key_offsets: torch.Tensor
    tables: torch.Tensor
    longest_query: int
    longest_key: int
    padded: bool = False


class VarlenAttention:
    """Flash attention over pages, causal and aligned at the end, so verify rows are rows like any other."""

    def __init__(
        self,
        spec: DecoderSpec,
        cache: KVCache,
        device: torch.device,
        *,
        kernel: Kernel = varlen_attn_out,
        key_offsets: bool = True,
    ) -> None:
        self._width, self._cache, self._device = spec.attention_size, cache, device
        self._kernel, self._key_offsets = kernel, key_offsets
        self._windows = [(window - 1 if window else -1, 0) for window in spec.windows]

    def plan(self, spans: Sequence[Span]) -> VarlenPlan:
        """Lengths and block tables of the step."""
        lengths = [span.start + span.fresh for span in spans]
        blocks = -(-max(lengths) // self._cache.block_size)
        tables = np.stack([span.table[:blocks] for span in spans]).astype(np.int32)
        return VarlenPlan(
            queries=self._int32([0, *accumulate(span.fresh for span in spans)]),
            keys=self._int32(lengths),
            key_offsets=self._int32([0, *accumulate(lengths)]),
            tables=torch.from_numpy(tables).to(self._device),
            longest_query=max(span.fresh for span in spans),
            longest_key=max(lengths),
        )

    def __call__(self, layer: int, q_THD: torch.Tensor, plan: object) -> torch.Tensor:
        assert isinstance(plan, VarlenPlan)
        keys, values = self._cache.paged(layer)
        make = torch.zeros if plan.padded else torch.empty
        out_THD = make(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        self._kernel(
            out_THD,
            q_THD,
            keys,
            values,
            plan.queries,
            plan.key_offsets if self._key_offsets else None,
            plan.longest_query,
            plan.longest_key,
            window_size=self._windows[layer],
            enable_gqa=True,
            seqused_k=plan.keys,
            block_table=plan.tables,
            num_splits=1,
        )
        return out_THD.view(-1, self._width)

    def _int32(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def reference_kernel(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    keys_NPKD: torch.Tensor,
    values_NPKD: torch.Tensor,
    queries: torch.Tensor,
    key_offsets: torch.Tensor | None,
    longest_query: int,
    longest_key: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int,
) -> None:
    """What `varlen_attn_out` promises for these arguments, row by row in fp32, on any device.

    Stands in for the kernel where there is none, and asserts what the kernel would refuse or, worse, read past.
    """
    rows, head_dim = len(seqused_k), q_THD.shape[2]
    group = q_THD.shape[1] // keys_NPKD.shape[2]
    assert (enable_gqa, num_splits, window_size[1]) == (True, 1, 0)
    assert {tensor.dtype for tensor in (queries, seqused_k, block_table)} == {torch.int32}
    assert (len(queries), len(block_table)) == (rows + 1, rows)
    assert key_offsets is None or torch.equal(key_offsets[1:], seqused_k.cumsum(0, dtype=torch.int32))
    for row in range(rows):
        first, last, length = int(queries[row]), int(queries[row + 1]), int(seqused_k[row])
        assert 0 <= last - first <= min(longest_query, length)
        assert length <= min(longest_key, block_table.shape[1] * keys_NPKD.shape[1])
        pages = block_table[row, : -(-length // keys_NPKD.shape[1])].long()
        k_LHD, v_LHD = (
            pool[pages].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1)
            for pool in (keys_NPKD, values_NPKD)
        )
        behind_QL = _behind(last - first, length, q_THD.device)
        hidden_QL = (behind_QL < 0) | (behind_QL > window_size[0] if window_size[0] >= 0 else False)
        scores_HQL = torch.einsum("qhd,lhd->hql", q_THD[first:last].float(), k_LHD) * head_dim**-0.5
        weights_HQL = scores_HQL.masked_fill(hidden_QL, float("-inf")).softmax(-1)
        out_THD[first:last] = torch.einsum("hql,lhd->qhd", weights_HQL, v_LHD).to(out_THD.dtype)


def _behind(fresh: int, length: int, device: torch.device) -> torch.Tensor:
    """[Q, L]: how many tokens a key lies behind each of the last `fresh` positions of `length`; negative is ahead."""
    positions_L = torch.arange(length, device=device)
    return positions_L[length - fresh :, None] - positions_L[None, :]


def agree(candidate: Attention, trusted: Attention, spec: DecoderSpec, cache: KVCache, device: torch.device) -> bool:
    """Whether two backends give the same attention on random pages: a row of one token, a chunk, a fresh prompt.

    One layer of each window is tried, and single tokens once more on their own, which kernels treat specially. Run at
    start-up, before anything is cached; the pages are zeroed again.
    """
    size = cache.block_size
    lengths = [(2 * size - 1, 1), (size // 2, 7), (0, size)]
    layers = sorted({spec.windows.index(window) for window in spec.windows})
    return all(
        _agree_once(candidate, trusted, spec, cache, device, layer, rows)
        for layer in layers
        for rows in (lengths, [(start, 1) for start, _ in lengths])
    )


def _agree_once(
    candidate: Attention,
    trusted: Attention,
    spec: DecoderSpec,
    cache: KVCache,
    device: torch.device,
    layer: int,
    lengths: list[tuple[int, int]],
) -> bool:
    size, dtype = cache.block_size, cache.dtype
    generator = torch.Generator().manual_seed(0)
    table = np.arange(1, CHECKED_BLOCKS + 1, dtype=np.int64)
    offsets = [0, *accumulate(fresh for _, fresh in lengths)]
    spans = [Span(offset, start, fresh, table) for offset, (start, fresh) in zip(offsets, lengths, strict=False)]
    slots = torch.arange(size, (CHECKED_BLOCKS + 1) * size, device=device)
    kv = torch.randn(len(slots), 2 * spec.kv_heads, spec.head_dim, generator=generator).to(device, dtype)
    q = torch.randn(offsets[-1], spec.heads, spec.head_dim, generator=generator).to(device, dtype)
    cache.write(layer, kv, cache.write_index(slots))
    try:
        found, wanted = candidate(layer, q, candidate.plan(spans)), trusted(layer, q, trusted.plan(spans))
        return bool(torch.allclose(found.float(), wanted.float(), atol=AGREEMENT, rtol=AGREEMENT))
    finally:
        cache.write(layer, torch.zeros_like(kv), cache.write_index(slots))
