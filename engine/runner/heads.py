"""What a forward gives back. Suffixes: R tokens whose result is wanted, E hidden size, V vocabulary."""

from typing import NamedTuple

import torch


class Heads(NamedTuple):
    """The LM head's input for the wanted tokens and, if asked for, their logits. Valid until the next run."""

    hidden_RE: torch.Tensor
    logits_RV: torch.Tensor
