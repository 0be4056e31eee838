"""Reading a speculator artefact: everything is checked before anything is changed.

An artefact directory holds manifest.json (its SHA-256 is the artefact's name) and speculator.safetensors. Files are
read once, so what was hashed is what is parsed.
Suffixes: K heads, E hidden size, V the pruned vocabulary, C tables of the conditioning (one for all heads, or K).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from engine.adapters.files import (
    MANIFEST,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    AdapterRefused,
    artifact_directory,
    header,
    json_object,
    read,
    verified,
)

HEADS = "speculator.safetensors"
# No training gets near it, and products of such numbers stay finite.
LARGEST = 1e6
CONDITIONINGS = ("none", "hydra")
DTYPES = ("BF16", "F32")
INTEGERS = ("I32",)


class SpeculatorRefused(AdapterRefused):
    """These heads cannot draft here; the message says why and what to do. Nothing was changed."""


class SpeculatorTooLarge(SpeculatorRefused):
    """The heads are good and this engine's slots are too small for them: the setting is at fault, not the artefact."""


@dataclass(frozen=True)
class Speculator:
    """Checked heads, on the CPU, in fp32 or bf16 as they were stored. `adapter`: whose states they were trained on.

    `tokens_V` are the token ids they can draft, ascending. `condition_CVE` [C, V + 1, E] is what the previous token
    adds inside the SiLU (its last row is for tokens outside `tokens_V`); None without conditioning. With `recurrent`
    a head starts from the state of the one before it, else from the LM head's input.
    """

    digest: str
    adapter: str | None
    recurrent: bool
    tokens_V: torch.Tensor
    weight_KEE: torch.Tensor
    bias_KE: torch.Tensor
    condition_CVE: torch.Tensor | None
    head_VE: torch.Tensor
    confidence_KF: torch.Tensor
    confidence_bias_K: torch.Tensor

    @property
    def heads(self) -> int:
        """K: the most tokens drafted at once."""
        return len(self.bias_KE)

    @property
    def vocabulary(self) -> int:
        """V: how many tokens can be drafted."""
        return len(self.tokens_V)


@dataclass(frozen=True)
class Limits:
    """What fits into a slot: hidden size, tokens of the model, most heads, most pruned ids."""

    hidden: int
    tokens: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class SpeculatorReader:
    """What heads must match to draft for this engine. `vocabulary` is the digest of the model's tokenizer.json."""

    root: Path
    base: str
    vocabulary: str
    limits: Limits
    dtype: torch.dtype

    def read(self, digest: str, path: str) -> Speculator:
        """Load and check everything. Raises AdapterRefused; touches no shared state, so any thread may call it."""
        directory = artifact_directory(self.root, path)
        manifest = self._manifest(directory, digest)
        shape = self._shape(manifest.get("shape"))
        raw = verified(directory / HEADS, self._max_bytes(), manifest)
        self._check_header(raw, shape)
        try:
            tensors = safetensors.torch.load(raw)
        except MemoryError:
            raise
        except Exception as error:
            raise SpeculatorRefused(f"{HEADS} is not a valid safetensors file: {error}") from error
        self._check_values(tensors)
        return Speculator(
            digest=digest,
            adapter=manifest["adapter"],
            recurrent=shape["recurrent"],
            tokens_V=tensors["tokens"],
            weight_KEE=tensors["weight"],
            bias_KE=tensors["bias"].float(),
            condition_CVE=tensors.get("condition"),
            head_VE=tensors["head"],
            confidence_KF=tensors["confidence"].float(),
            confidence_bias_K=tensors["confidence_bias"].float(),
        )

    def _manifest(self, directory: Path, digest: str) -> Mapping[str, Any]:
        """The manifest, parsed from the very bytes that have the digest."""
        raw = read(directory / MANIFEST, MAX_JSON_BYTES)
        found = hashlib.sha256(raw).hexdigest()
        if found != digest:
            raise SpeculatorRefused(
                f"the manifest's digest is {found[:12]}…, not {digest[:12]}…: the artefact was changed; train it again"
            )
        manifest = json_object(raw, MANIFEST)
        if manifest.get("kind") != "speculator":
            raise SpeculatorRefused(f"the artefact is a {str(manifest.get('kind'))[:40]!r}, not a speculator")
        if manifest.get("base") != self.base:
            raise SpeculatorRefused("the heads were trained on another base model: train them on this one")
        if manifest.get("vocabulary") != self.vocabulary:
            raise SpeculatorRefused("the heads were trained with another tokenizer.json: train them with this one")
        if not isinstance(manifest.get("adapter", 0), str | None):
            raise SpeculatorRefused("the manifest does not say whose states the heads were trained on (adapter)")
        return manifest

    def _shape(self, shape: object) -> Mapping[str, Any]:
        """The manifest's shape, in range for the slots."""
        if not isinstance(shape, dict):
            raise SpeculatorRefused("the manifest has no shape")
        for name, most in (("heads", self.limits.heads), ("vocabulary", self.limits.vocabulary)):
            value = shape.get(name)
            if type(value) is not int or value < 1:
                raise SpeculatorRefused(f"the manifest's shape says {name} is {str(value)[:40]}")
            if value > most:
                flag = f"--speculator-{name}"
                raise SpeculatorTooLarge(f"{value} {name} do not fit a slot of {most}: train fewer, or raise {flag}")
        if shape.get("hidden") != self.limits.hidden:
            hidden = str(shape.get("hidden"))[:40]
            raise SpeculatorRefused(f"the heads have hidden size {hidden}, this base has {self.limits.hidden}")
        if shape.get("conditioning") not in CONDITIONINGS:
            known, found = " or ".join(CONDITIONINGS), str(shape.get("conditioning"))[:40]
            raise SpeculatorRefused(f"conditioning {found!r} is not served, only {known}")
        if not isinstance(shape.get("recurrent"), bool):
            raise SpeculatorRefused("the manifest's shape does not say whether the heads are recurrent")
        return shape

    def _max_bytes(self) -> int:
        """As large as a slot, in fp32."""
        heads, hidden, words = self.limits.heads, self.limits.hidden, self.limits.vocabulary
        per_head = hidden * (hidden + words + 1) + 2 * hidden + 2
        return 4 * (heads * per_head + words * (hidden + 1)) + MAX_HEADER_BYTES

    def _check_header(self, raw: bytes, shape: Mapping[str, Any]) -> None:
        """Names, dtypes and shapes, before any tensor is made."""
        entries = header(raw, HEADS)
        heads, hidden, words = shape["heads"], shape["hidden"], shape["vocabulary"]
        expected: dict[str, tuple[list[int], ...]] = {
            "tokens": ([words],),
            "weight": ([heads, hidden, hidden],),
            "bias": ([heads, hidden],),
            "head": ([words, hidden],),
            "confidence": ([heads, hidden + 1],),
            "confidence_bias": ([heads],),
        }
        if shape["conditioning"] == "hydra":
            expected["condition"] = ([heads, words + 1, hidden], [1, words + 1, hidden])
        if missing := sorted(expected.keys() - entries.keys()):
            raise SpeculatorRefused(f"{HEADS} holds no {missing[0]}")
        if extra := sorted(entries.keys() - expected.keys()):
            raise SpeculatorRefused(f"{HEADS} holds {extra[0][:120]!r}, which has no place in these heads")
        for name, shapes in expected.items():
            found, dtypes = entries[name], INTEGERS if name == "tokens" else DTYPES
            if found.get("shape") not in shapes:
                sizes = str(found.get("shape"))[:120]
                raise SpeculatorRefused(f"{name} has shape {sizes}, the manifest promises {shapes[0]}")
            if found.get("dtype") not in dtypes:
                raise SpeculatorRefused(f"{name} has dtype {str(found.get('dtype'))[:40]}, not {' or '.join(dtypes)}")

    def _check_values(self, tensors: Mapping[str, torch.Tensor]) -> None:
        tokens_V = tensors["tokens"].long()
        if int(tokens_V.min()) < 0 or int(tokens_V.max()) >= self.limits.tokens:
            raise SpeculatorRefused(f"tokens names ids outside this model's vocabulary of {self.limits.tokens}")
        if not bool((tokens_V.diff() > 0).all()):
            raise SpeculatorRefused("tokens are not in ascending order, each once")
        for name, tensor in tensors.items():
            if name != "tokens" and not bool(torch.isfinite(tensor.to(self.dtype)).all()):
                raise SpeculatorRefused(f"{name} holds NaN or infinity")
            if name != "tokens" and float(tensor.abs().max()) > LARGEST:
                raise SpeculatorRefused(f"{name} holds numbers beyond {LARGEST:g}: products of them would overflow")
