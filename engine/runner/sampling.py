"""The next token of every row that reached its end."""

from collections.abc import Sequence as Rows

import torch

from engine.layers.sampler import Draw, Sampled, sample
from engine.scheduling.scheduler import Row


def draw(rows: Rows[Row], logits_RV: torch.Tensor) -> Sampled:
    """One token per row from its logits, in the order of the rows. The logits may be changed in place."""
    draws = [Draw(row.sequence.request.sampling, row.sequence.request.choice, len(row.sequence.tokens)) for row in rows]
    return sample(logits_RV, draws)
