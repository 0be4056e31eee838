"""`sample` of engine.layers.sampler in C++, the same noise and the same rules; the original elsewhere."""

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from engine.layers import sampler
from engine.layers.sampler import MASK, Sampled
from engine.native.build import NoNative, library
from engine.native.library import Draw, functions


@cache
def available() -> bool:
    """Whether the library is here."""
    try:
        library()
    except NoNative:
        return False
    return True


def sample(logits_RV: torch.Tensor, draws: Sequence[sampler.Draw]) -> Sampled:
    """One token per row; see engine.layers.sampler.sample, which answers for devices and dtypes this cannot read."""
    readable = logits_RV.device.type == "cpu" and logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1
    if not readable or not available():
        return sampler.sample(logits_RV, draws)
    rows, size = logits_RV.shape
    wanted = _flattened(draws, size)
    tokens, logprobs = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.float32)
    behind = np.array([-1 if draw.behind is None else draw.behind for draw in draws], dtype=np.int64)
    failed = functions().whet_sample(
        logits_RV.data_ptr(), logits_RV.stride(0), rows, size, wanted, behind.ctypes.data, tokens.ctypes.data,
        logprobs.ctypes.data,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to sample from a vocabulary of {size}")
    return Sampled(tokens.tolist(), logprobs.tolist())


def _flattened(draws: Sequence[sampler.Draw], size: int) -> ctypes.Array[Draw]:
    """All draws in a row; those of one request's drafted places differ in their position only."""
    wanted = (Draw * len(draws))()
    last: sampler.Draw | None = None
    for place, draw in enumerate(draws):
        if last is not None and draw.sampling is last.sampling and draw.choice == last.choice:
            wanted[place] = wanted[place - 1]
            wanted[place].position = draw.position
        else:
            wanted[place] = _flat(draw, size)
        last = draw
    return wanted


def _flat(draw: sampler.Draw, size: int) -> Draw:
    asked = draw.sampling
    return Draw(
        asked.seed & MASK, draw.choice, draw.position,
        asked.temperature, asked.top_p, asked.min_p if math.isfinite(asked.min_p) else 0.0, min(asked.top_k, size),
    )  # fmt: skip
