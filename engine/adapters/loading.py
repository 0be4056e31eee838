"""Reading a LoRA artefact: everything is checked before anything is changed.

An artefact directory holds manifest.json (its SHA-256 is the artefact's name), adapter_config.json and
adapter_model.safetensors as PEFT writes them. Files are read once, so what was hashed is what is parsed.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from engine.adapters.files import (
    CONFIG,
    MANIFEST,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    WEIGHTS,
    AdapterRefused,
    artifact_directory,
    header,
    json_object,
    read,
    verified,
)
from engine.adapters.recipe import Recipe, read_recipe
from engine.models.spec import DecoderSpec

# A tuple: what a header names need not be hashable.
DTYPES = ("BF16", "F16", "F32")
# The parts of each fused projection, in the order the decoder fuses them.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "head": ("lm_head",),
}
HEAD_TENSOR = "base_model.model.score.weight"
TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:model\.layers\.(\d{1,4})\.([a-z_.]+)|(lm_head|score))\.lora_([AB])\.weight"
)
EXPERT_NAME = re.compile(r"\.(?:experts|block_sparse_moe|mlp\.gate|mlp\.router|shared_expert\w*)\.")


class Place(NamedTuple):
    """Where a matrix belongs: `layer` is None for the heads, `side` A or B."""

    layer: int | None
    part: str
    side: str

    @property
    def module(self) -> str:
        """The module's name, as PEFT's patterns see it."""
        return self.part if self.layer is None else f"model.layers.{self.layer}.{self.part}"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter, fp32: per projection stacked A [R, in], block-diagonal scaled B [R, out].

    For classifiers `score` [labels, E] replaces the base's head where it is given, and `score_delta` is added to it.
    """

    digest: str
    rank: int
    projections: Mapping[tuple[int | None, str], tuple[torch.Tensor, torch.Tensor]]
    sizes: Mapping[str, tuple[int, int]]
    score: torch.Tensor | None = None
    score_delta: torch.Tensor | None = None

    def matrices(self, layer: int | None, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of one fused projection; empty when it was not trained."""
        in_size, out_size = self.sizes[name]
        return self.projections.get((layer, name)) or (torch.zeros(0, in_size), torch.zeros(0, out_size))


@dataclass(frozen=True)
class AdapterReader:
    """What an adapter must match to be served by this engine."""

    root: Path
    base: str
    spec: DecoderSpec
    max_rank: int
    dtype: torch.dtype

    def read(self, digest: str, path: str) -> Adapter:
        """Load and check everything. Raises AdapterRefused; touches no shared state, so any thread may call it."""
        directory = artifact_directory(self.root, path)
        manifest = self._manifest(directory, digest)
        config_bytes = verified(directory / CONFIG, MAX_JSON_BYTES, manifest)
        weight_bytes = verified(directory / WEIGHTS, self._max_weight_bytes(), manifest)
        recipe = read_recipe(json_object(config_bytes, CONFIG), self.max_rank, classifier=bool(self.spec.labels))
        self._check_header(weight_bytes, recipe)
        try:
            tensors = safetensors.torch.load(weight_bytes)
        except MemoryError:
            raise
        except Exception as error:
            raise AdapterRefused(f"{WEIGHTS} is not a valid safetensors file: {error}") from error
        return self._assemble(digest, recipe, tensors)

    def _manifest(self, directory: Path, digest: str) -> Mapping[str, Any]:
        """The manifest, parsed from the very bytes that have the digest."""
        raw = read(directory / MANIFEST, MAX_JSON_BYTES)
        found = hashlib.sha256(raw).hexdigest()
        if found != digest:
            raise AdapterRefused(
                f"the manifest's digest is {found[:12]}…, not {digest[:12]}…: the artefact was changed"
            )
        manifest = json_object(raw, MANIFEST)
        if manifest.get("kind") != "adapter":
            raise AdapterRefused(f"the artefact is a {manifest.get('kind')!r}, not an adapter")
        if manifest.get("base") != self.base:
            raise AdapterRefused("the adapter was trained for another base model")
        return manifest

    def _max_weight_bytes(self) -> int:
        """As if every module were trained, in fp32, at the largest rank."""
        elements = sum(
            self.max_rank * (in_size + out_size) * (1 if part in ("lm_head", "score") else self.spec.layers)
            for part, (in_size, out_size) in self._sizes.items()
        )
        return 4 * (elements + len(self.spec.labels) * self.spec.hidden_size) + MAX_HEADER_BYTES

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Input and output size of every part that may carry LoRA."""
        spec = self.spec
        kv = spec.kv_heads * spec.head_dim
        head = ("score", len(spec.labels)) if spec.labels else ("lm_head", spec.vocab_size)
        return {
            "self_attn.q_proj": (spec.hidden_size, spec.attention_size),
            "self_attn.k_proj": (spec.hidden_size, kv),
            "self_attn.v_proj": (spec.hidden_size, kv),
            "self_attn.o_proj": (spec.attention_size, spec.hidden_size),
            "mlp.gate_proj": (spec.hidden_size, spec.intermediate_size),
            "mlp.up_proj": (spec.hidden_size, spec.intermediate_size),
            "mlp.down_proj": (spec.intermediate_size, spec.hidden_size),
            head[0]: (spec.hidden_size, head[1]),
        }

    def _check_header(self, raw: bytes, recipe: Recipe) -> None:
        """Names, dtypes and shapes, before any tensor is made; every A has its B."""
        entries = header(raw)
        seen: set[Place] = set()
        for name, entry in entries.items():
            if name == HEAD_TENSOR and recipe.own_head:
                expected = [len(self.spec.labels), self.spec.hidden_size]
            else:
                place = self._place(name)
                seen.add(place)
                rank, (in_size, out_size) = recipe.rank_of(place.module), self._sizes[place.part]
                expected = [rank, in_size] if place.side == "A" else [out_size, rank]
            if entry.get("shape") != expected:
                raise AdapterRefused(f"{name} has shape {entry.get('shape')}, this base needs {expected}")
            if entry.get("dtype") not in DTYPES:
                raise AdapterRefused(f"{name} has dtype {entry.get('dtype')}, not one of {', '.join(DTYPES)}")
        if not entries:
            raise AdapterRefused(f"{WEIGHTS} holds no LoRA matrices")
        if recipe.own_head and HEAD_TENSOR not in entries:
            raise AdapterRefused(f"modules_to_save promises a classification head, but {WEIGHTS} holds none")
        lonely = [place for place in seen if place._replace(side="BA"["AB".index(place.side)]) not in seen]
        if lonely:
            raise AdapterRefused(f"{lonely[0].part} of layer {lonely[0].layer} has only one of its two LoRA matrices")

    def _place(self, name: str) -> Place:
        match = TENSOR_NAME.fullmatch(name)
        layer = int(match[1]) if match and match[1] else None
        part = (match[2] or match[3]) if match else ""
        known = part in self._sizes and (layer is None) == (part in ("lm_head", "score"))
        if known and layer is not None:
            sparse = layer < self.spec.layers and self.spec.sparse[layer]
            known = layer < self.spec.layers and not (sparse and part.startswith("mlp."))
        if match is not None and known:
            return Place(layer, part, match[4])
        if EXPERT_NAME.search(name):
            raise AdapterRefused(f"tensor {name[:120]!r}: LoRA on mixture-of-experts layers is not served")
        raise AdapterRefused(
            f"tensor {name[:120]!r} has no place in this base; LoRA is served on {', '.join(self._sizes)}"
        )

    def _assemble(self, digest: str, recipe: Recipe, tensors: dict[str, torch.Tensor]) -> Adapter:
        head = tensors.pop(HEAD_TENSOR, None)
        if head is not None and not bool(torch.isfinite(head).all()):
            raise AdapterRefused(f"{HEAD_TENSOR} holds NaN or infinity")
        placed = {self._place(name): tensor.float() for name, tensor in tensors.items()}
        for place, tensor in placed.items():
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterRefused(f"lora_{place.side} of {place.part} in layer {place.layer} holds NaN or infinity")
        projections = {}
        for layer in (*range(self.spec.layers), None):
            for fused, parts in PARTS.items():
                if any(Place(layer, part, "A") in placed for part in parts):
                    projections[layer, fused] = self._stack(layer, parts, placed, recipe)
        delta = self._head_delta(placed, recipe)
        ranks = [recipe.rank_of(place.module) for place in placed]
        return Adapter(digest, max(ranks, default=0), projections, self._fused_sizes(), _fp32(head), delta)

    def _head_delta(self, placed: Mapping[Place, torch.Tensor], recipe: Recipe) -> torch.Tensor | None:
        """LoRA on a classification head is merged here: the head is small and has a copy per slot anyway."""
        if Place(None, "score", "A") not in placed:
            return None
        product = placed[Place(None, "score", "B")] @ placed[Place(None, "score", "A")]
        return product * recipe.scaling_of("score")

    def _fused_sizes(self) -> dict[str, tuple[int, int]]:
        sizes = {"lm_head": (self.spec.hidden_size, self.spec.vocab_size)} | self._sizes
        return {fused: (sizes[parts[0]][0], sum(sizes[part][1] for part in parts)) for fused, parts in PARTS.items()}

    def _stack(
        self, layer: int | None, parts: tuple[str, ...], placed: Mapping[Place, torch.Tensor], recipe: Recipe
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrices on top of each other; B block-diagonal, transposed, with the scaling folded in (in fp32)."""
        present = [part for part in parts if Place(layer, part, "A") in placed]
        a = torch.cat([placed[Place(layer, part, "A")] for part in present])
        b = torch.zeros(len(a), sum(self._sizes[part][1] for part in parts))
        row = column = 0
        for part in parts:
            width = self._sizes[part][1]
            if part in present:
                out = placed[Place(layer, part, "B")] * recipe.scaling_of(Place(layer, part, "B").module)
                b[row : row + out.shape[1], column : column + width] = out.T
                row += out.shape[1]
            column += width
        if not bool(torch.isfinite(a.to(self.dtype)).all() and torch.isfinite(b.to(self.dtype)).all()):
            raise AdapterRefused(f"LoRA matrices of {present[0]} in layer {layer} overflow the engine's precision")
        return a, b


def _fp32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()
