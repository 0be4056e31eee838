"""Speculators on disk: writing what was trained, and reading the champion through the engine's own checks."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.digest import base_digest, file_digest
from engine.speculation.loading import HEADS, Limits, Speculator, SpeculatorReader
from worker.training.head_data import places_of
from worker.training.head_model import Heads

FILES = (HEADS,)
# Champions may be larger than this run's heads; the engine's own limits apply where they are served.
MOST_HEADS, MOST_WORDS = 64, 1 << 17


def save(heads: Heads, tokens_V: torch.Tensor, directory: Path) -> None:
    """Write the engine's tensors in bf16, which costs acceptance nothing, and round `heads` to what was written."""
    with torch.no_grad():
        for parameter in [*heads.drafting(), heads.head_VE]:
            parameter.copy_(parameter.bfloat16())
    tensors = {
        "tokens": tokens_V.int(),
        "weight": heads.weight.bfloat16(),
        "bias": heads.bias.bfloat16(),
        "head": heads.head_VE.bfloat16(),
        "confidence": heads.confidence.float(),
        "confidence_bias": heads.confidence_bias.float(),
    }
    if heads.condition is not None:
        tensors["condition"] = heads.condition.bfloat16()
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, directory / HEADS)


def read(directory: Path, model: Path, hidden: int, vocabulary: int) -> Speculator:
    """A published speculator of this base. Raises AdapterRefused when it is not, or not what its manifest promises."""
    reader = SpeculatorReader(
        root=directory.parent,
        base=base_digest(model),
        vocabulary=file_digest(model / "tokenizer.json"),
        limits=Limits(hidden=hidden, tokens=vocabulary, heads=MOST_HEADS, vocabulary=MOST_WORDS),
        dtype=torch.float32,
    )
    return reader.read(directory.name, directory.name)


def as_heads(speculator: Speculator) -> Heads:
    """A published speculator as a module, to be measured."""
    conditioning = "none" if speculator.condition_CVE is None else "hydra"
    heads = Heads(speculator.head_VE, speculator.heads, conditioning=conditioning, recurrent=speculator.recurrent)
    with torch.no_grad():
        _fill(heads, speculator)
        heads.confidence.copy_(speculator.confidence_KF)
        heads.confidence_bias.copy_(speculator.confidence_bias_K)
        if heads.condition is not None and speculator.condition_CVE is not None:
            heads.condition.copy_(speculator.condition_CVE.float().expand_as(heads.condition))
    return heads


def as_speculator(heads: Heads, tokens_V: torch.Tensor) -> Speculator:
    """Trained heads as the engine would have read them."""
    return Speculator(
        digest="",
        adapter=None,
        recurrent=heads.recurrent,
        tokens_V=tokens_V.int(),
        weight_KEE=heads.weight.detach(),
        bias_KE=heads.bias.detach(),
        condition_CVE=None if heads.condition is None else heads.condition.detach(),
        head_VE=heads.head_VE,
        confidence_KF=heads.confidence.detach(),
        confidence_bias_K=heads.confidence_bias.detach(),
    )


@torch.no_grad()
def warm_start(heads: Heads, tokens_V: torch.Tensor, champion: Speculator, vocabulary: int) -> bool:
    """Begin where the champion ended, if it has as many heads of this kind; words are matched by their ids."""
    same = heads.weight.shape == champion.weight_KEE.shape and heads.recurrent == champion.recurrent
    if not same or (heads.condition is None) != (champion.condition_CVE is None):
        return False
    _fill(heads, champion)
    if heads.condition is not None and champion.condition_CVE is not None:
        rows = places_of(champion.tokens_V.long(), vocabulary)[tokens_V]
        known = rows < champion.vocabulary
        table = champion.condition_CVE.float().expand(len(heads.weight), -1, -1)
        heads.condition[:, :-1][:, known] = table[:, rows[known]]
        heads.condition[:, -1] = table[:, -1]
    return True


def _fill(heads: Heads, speculator: Speculator) -> None:
    heads.weight.copy_(speculator.weight_KEE.float())
    heads.bias.copy_(speculator.bias_KE)
