"""The next token of every row that reached its end."""

import math
from collections.abc import Sequence as Rows

import torch

from engine.layers.sampler import Draw, Fault, Sampled, sample
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence

NOT_FINITE = Fault("internal", "the model's logits are not finite")


def draw(rows: Rows[Row], logits_RV: torch.Tensor) -> Sampled:
    """One token per row from its logits, in the order of the rows. The logits may be changed in place."""
    draws = [Draw(row.sequence.request.sampling, row.sequence.request.choice, len(row.sequence.tokens)) for row in rows]
    sampled = sample(logits_RV, draws)
    faults = [None if math.isfinite(logprob) else NOT_FINITE for logprob in sampled.logprobs]
    return sampled._replace(top=[[] for _ in rows], faults=faults)


def accepted(sequence: Sequence, token: int) -> None:
    """Advance what a request keeps beside its tokens; call it once for every token that was accepted, in order."""


def complete(sequence: Sequence) -> bool:
    """Whether nothing more may follow what was accepted: the request then ends with reason "stop"."""
    return False
