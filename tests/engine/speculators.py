"""Writes speculator artefacts: random heads, or given ones, for the model in a directory."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from engine.digest import base_digest
from engine.speculation.loading import HEADS
from engine.speculation.manager import vocabulary_digest

Tensors = dict[str, torch.Tensor]


def random_heads(
    hidden: int,
    tokens: list[int],
    *,
    heads: int = 4,
    conditioning: str = "hydra",
    tables: int = 0,
    seed: int = 0,
    scale: float = 3.0,
) -> Tensors:
    """Heads that draft anything of `tokens`. `tables` 1 shares the conditioning between heads; 0: a table for each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    made = {
        "tokens": torch.tensor(sorted(tokens), dtype=torch.int32),
        "weight": normal(heads, hidden, hidden, std=hidden**-0.5),
        "bias": normal(heads, hidden, std=0.1),
        "head": normal(len(tokens), hidden, std=scale * hidden**-0.5),
        "confidence": normal(heads, hidden + 1, std=hidden**-0.5),
        "confidence_bias": normal(heads, std=1.0),
    }
    if conditioning == "hydra":
        made["condition"] = normal(tables or heads, len(tokens) + 1, hidden, std=0.5)
    return made


def manifest_of(model: Path, tensors: Tensors, *, recurrent: bool = True, **changes: object) -> dict[str, Any]:
    """What a trainer would write for these tensors; any key may be given otherwise."""
    heads, hidden = tensors["bias"].shape
    shape = {
        "heads": heads,
        "hidden": hidden,
        "vocabulary": len(tensors["tokens"]),
        "conditioning": "hydra" if "condition" in tensors else "none",
        "recurrent": recurrent,
    }
    return {
        "kind": "speculator",
        "base": base_digest(model),
        "adapter": None,
        "vocabulary": vocabulary_digest(model),
        "project": "",
        "run": "",
        "window": {"first": "", "last": "", "interactions": 0, "tokens": 0},
        "tau": {"greedy": 1.0, "shared": 1.0},
        "params": {},
        "shape": shape,
        "code_version": "",
    } | changes


def write_speculator(root: Path, manifest: dict[str, Any], tensors: Tensors | bytes) -> str:
    """Save an artefact directory below `root`, its file's digest in the manifest; returns its own digest and name."""
    raw = tensors if isinstance(tensors, bytes) else save(tensors)
    full = {"files": {HEADS: hashlib.sha256(raw).hexdigest()}} | manifest
    text = json.dumps(full).encode()
    digest = hashlib.sha256(text).hexdigest()
    (root / digest).mkdir(parents=True)
    (root / digest / HEADS).write_bytes(raw)
    (root / digest / "manifest.json").write_bytes(text)
    return digest


def random_speculator(
    root: Path,
    model: Path,
    *,
    adapter: str | None = None,
    recurrent: bool = True,
    tokens: list[int] | None = None,
    heads: int = 4,
    conditioning: str = "hydra",
    tables: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> str:
    """An artefact with random heads over `tokens` (else the first of the model's); returns its digest."""
    config = json.loads((model / "config.json").read_text())
    known = tokens or list(range(min(config["vocab_size"], 128)))
    made = random_heads(config["hidden_size"], known, heads=heads, conditioning=conditioning, tables=tables, seed=seed)
    made = {name: tensor if name == "tokens" else tensor.to(dtype) for name, tensor in made.items()}
    return write_speculator(root, manifest_of(model, made, adapter=adapter, recurrent=recurrent), made)


def bigram_speculator(root: Path, model: Path, texts: list[list[int]], **changes: object) -> str:
    """Heads that draft what last followed a token in these texts: head after head from the token before alone.

    A token's code is a row of signs; what follows x is loud in the condition of x, and the head listens for codes.
    """
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    follows = {token: after for text in texts for token, after in pairwise(text)}
    known = sorted({*follows, *follows.values()})
    codes_VE = torch.randn(len(known), hidden, generator=torch.Generator().manual_seed(0)).sign()
    # What a code leaves behind a SiLU: its positive part. Every code has as much of it.
    codes_VE /= codes_VE.clamp_min(0).sum(-1, keepdim=True)
    place = {token: index for index, token in enumerate(known)}
    heads = 4
    condition_CVE = torch.zeros(1, len(known) + 1, hidden)
    for token, after in follows.items():
        condition_CVE[0, place[token]] = 1000 * codes_VE[place[after]]
    made = {
        "tokens": torch.tensor(known, dtype=torch.int32),
        "weight": torch.zeros(heads, hidden, hidden),
        "bias": torch.zeros(heads, hidden),
        "condition": condition_CVE,
        "head": codes_VE,
        "confidence": torch.zeros(heads, hidden + 1),
        "confidence_bias": torch.full((heads,), 2.0),
    }
    return write_speculator(root, manifest_of(model, made, recurrent=False, **changes), made)
