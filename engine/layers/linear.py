"""Linear layers: packed oneDNN weights where the CPU has them, plain matrix products as their reference."""

from functools import cache

import torch
from torch.nn import functional


@cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linear exists here and agrees with the plain one.

    Packed weights are 1.5 to 3 times faster for few rows, and every row's result is the same in any batch.
    """
    weight, x = torch.linspace(-1, 1, 128).reshape(8, 16).to(dtype), torch.linspace(-1, 1, 48).reshape(3, 16).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(found.float(), functional.linear(x, weight).float(), atol=0.05))


class Linear:
    """y = x Wᵀ + b for `weight` [out, in]. Packs a copy on CPU; the dense weight is then let go."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pack: bool = True) -> None:
        self.out_size, self.in_size = weight.shape
        self.bias = bias
        self.packed = pack and weight.device.type == "cpu" and packing_works(weight.dtype)
        dense = weight.contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(dense) if self.packed else dense

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return functional.linear(x, self.weight, self.bias)
