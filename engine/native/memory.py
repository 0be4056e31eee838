"""Memory in huge pages where the system gives them: weights and KV pages are read far apart, and a page table that fits
the processor's own cache is worth several percent of a step (benchmarks/NOTES.md)."""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch

ALIGNMENT = 64
CHUNK_BYTES = 16 << 20


class Arena:
    """Zeroed tensors that live as long as the arena or a tensor of it does."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own; untouched pages cost no memory."""
        size = prod(shape) * dtype.itemsize
        if size > len(self._room):
            self._room = _huge(max(size, CHUNK_BYTES))
        piece, self._room = self._room[:size], self._room[-(-size // ALIGNMENT) * ALIGNMENT :]
        return piece.view(dtype).view(tuple(shape))

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, here."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


def _huge(size: int) -> torch.Tensor:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without huge pages gives the same memory, a little slower.
    with suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
