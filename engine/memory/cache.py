"""The paged KV cache: one tensor per layer, addressed by block.

Heads come before blocks, so that gathering a sequence's pages gives contiguous [heads, tokens, D] matrices and
attention is a plain batched product (on CPU twice as fast as SDPA over a strided view, in bf16).
Suffixes: T tokens, K key-value heads, N blocks, P tokens in a block, D head dimension.
"""

from collections.abc import Sequence

import torch

from engine.models.spec import DecoderSpec


class KVCache:
    """Keys and values of all layers. Zeroed at birth: padding lanes are masked, and 0 times NaN would still be NaN."""

    def __init__(
        self, spec: DecoderSpec, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.blocks = blocks + 1
        self.block_size = block_size
        self.dtype = dtype
        self._kv_heads = spec.kv_heads
        lanes = 2 * spec.kv_heads
        shape = (spec.layers, lanes * self.blocks, block_size, spec.head_dim)
        self._pages = torch.zeros(shape, dtype=dtype, device=device)
        self._tokens = self._pages.view(spec.layers, lanes * self.blocks * block_size, spec.head_dim)
        self._lane_pages = torch.arange(lanes, device=device) * self.blocks
        self._scratch = torch.empty(0, dtype=dtype, device=device)

    def write_index(self, slots_T: torch.Tensor) -> torch.Tensor:
        """Rows of a layer that hold these token slots (block * block_size + offset), for all lanes; once per step."""
        return (slots_T[:, None] + self._lane_pages * self.block_size).reshape(-1)

    def write(self, layer: int, kv_TKD: torch.Tensor, index: torch.Tensor) -> None:
        """Store keys and values [T, 2K, D]."""
        self._tokens[layer].index_copy_(0, index, kv_TKD.reshape(-1, kv_TKD.shape[-1]))

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero these blocks in all layers."""
        lanes = self._pages.view(self._pages.shape[0], 2 * self._kv_heads, self.blocks, -1)
        lanes.index_fill_(2, torch.tensor(blocks, device=lanes.device), 0)

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, from and to, in all layers."""
        lanes = self._pages.view(self._pages.shape[0], 2 * self._kv_heads, self.blocks, -1)
        source, target = torch.tensor(blocks, device=lanes.device).unbind(1)
        lanes.index_copy_(2, target, lanes.index_select(2, source))

    def gather_index(self, tables_BN: torch.Tensor) -> torch.Tensor:
        """Pages of a layer for rows with these block tables, ordered (k or v, row, head, block); once per step."""
        lanes = self._lane_pages.view(2, 1, self._kv_heads, 1)
        return (lanes + tables_BN[None, :, None, :]).reshape(-1)

    def gather(self, layer: int, index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows * K, tokens, D], contiguous, valid until the next gather."""
        size = index.numel() * self._pages.shape[2] * self._pages.shape[3]
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=self._pages.dtype, device=self._pages.device)
        out = self._scratch[:size].view(index.numel(), *self._pages.shape[2:])
        torch.index_select(self._pages[layer], 0, index, out=out)
        keys, values = out.view(2, rows * self._kv_heads, -1, self._pages.shape[3]).unbind(0)
        return keys, values

    def paged(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [N, P, K, D] views, the layout paged attention kernels take."""
        view = self._pages[layer].view(2, self._kv_heads, self.blocks, self.block_size, -1)
        keys, values = view.permute(0, 2, 3, 1, 4).unbind(0)
        return keys, values
