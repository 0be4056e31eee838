"""Reading a LoRA artefact: everything is checked before anything is changed.

An artefact directory holds manifest.json (its SHA-256 is the artefact's name), adapter_config.json and
adapter_model.safetensors as PEFT writes them. Files are read once, so what was hashed is what is parsed.
"""

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from engine.models.spec import DecoderSpec

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
MAX_HEADER_BYTES = 4 << 20
MAX_JSON_BYTES = 1 << 20
DTYPES = {"F32", "F16", "BF16"}
# The parts of each fused projection, in the order the decoder fuses them.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "head": ("lm_head",),
}
# Keys whose value matters here or is mere description; any other key must be empty, or it asks for what we do not do.
KNOWN_KEYS = {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout"}
KNOWN_KEYS |= {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "init_lora_weights",
    "auto_mapping",
    "peft_version",
}
KNOWN_KEYS |= {"bias", "exclude_modules", "layers_to_transform", "layers_pattern"}
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
TENSOR_NAME = re.compile(r"base_model\.model\.(?:model\.layers\.(\d{1,4})\.([a-z_.]+)|(lm_head))\.lora_([AB])\.weight")


class AdapterRefused(ValueError):
    """The artefact cannot be served; the message says why. Nothing was changed."""


@dataclass(frozen=True)
class Adapter:
    """A checked adapter, fp32: per projection stacked A [R, in], block-diagonal scaled B [R, out]."""

    digest: str
    rank: int
    projections: Mapping[tuple[int | None, str], tuple[torch.Tensor, torch.Tensor]]
    sizes: Mapping[str, tuple[int, int]]

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
        directory = self._directory(path)
        self._check_manifest(directory, digest)
        manifest = json.loads(_read(directory / MANIFEST, MAX_JSON_BYTES))
        config_bytes = _verified(directory / CONFIG, MAX_JSON_BYTES, manifest)
        weight_bytes = _verified(directory / WEIGHTS, self._max_weight_bytes(), manifest)
        rank, scaling = _check_config(_json_object(config_bytes, CONFIG), self.max_rank)
        self._check_header(weight_bytes, rank)
        try:
            tensors = safetensors.torch.load(weight_bytes)
        except Exception as error:
            raise AdapterRefused(f"{WEIGHTS} is not a valid safetensors file: {error}") from error
        return self._assemble(digest, rank, scaling, tensors)

    def _directory(self, path: str) -> Path:
        """The artefact directory; below the root, reached without symbolic links or `..`."""
        given = Path(path)
        if "\0" in path or ".." in given.parts:
            raise AdapterRefused("the artefact path must not contain '..'")
        full = given if given.is_absolute() else self.root / given
        if not full.is_relative_to(self.root) or full == self.root:
            raise AdapterRefused("the artefact path is not below the engine's artefact root")
        here = self.root
        for part in full.relative_to(self.root).parts:
            here = here / part
            if here.is_symlink():
                raise AdapterRefused(f"the artefact path goes through a symbolic link: {part}")
        if not full.is_dir():
            raise AdapterRefused(f"there is no artefact directory at {full.relative_to(self.root)}")
        return full

    def _check_manifest(self, directory: Path, digest: str) -> None:
        raw = _read(directory / MANIFEST, MAX_JSON_BYTES)
        found = hashlib.sha256(raw).hexdigest()
        if found != digest:
            raise AdapterRefused(
                f"the manifest's digest is {found[:12]}…, not {digest[:12]}…: the artefact was changed"
            )
        manifest = _json_object(raw, MANIFEST)
        if manifest.get("kind") != "adapter":
            raise AdapterRefused(f"the artefact is a {manifest.get('kind')!r}, not an adapter")
        if manifest.get("base") != self.base:
            raise AdapterRefused("the adapter was trained for another base model")

    def _max_weight_bytes(self) -> int:
        spec = self.spec
        outs = spec.qkv_size + 2 * spec.hidden_size + 2 * spec.intermediate_size
        ins = 5 * spec.hidden_size + spec.attention_size + spec.intermediate_size
        elements = self.max_rank * (spec.layers * (ins + outs) + spec.hidden_size + spec.vocab_size)
        return 4 * elements + MAX_HEADER_BYTES

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Input and output size of every part that may carry LoRA."""
        spec = self.spec
        kv = spec.kv_heads * spec.head_dim
        return {
            "self_attn.q_proj": (spec.hidden_size, spec.attention_size),
            "self_attn.k_proj": (spec.hidden_size, kv),
            "self_attn.v_proj": (spec.hidden_size, kv),
            "self_attn.o_proj": (spec.attention_size, spec.hidden_size),
            "mlp.gate_proj": (spec.hidden_size, spec.intermediate_size),
            "mlp.up_proj": (spec.hidden_size, spec.intermediate_size),
            "mlp.down_proj": (spec.intermediate_size, spec.hidden_size),
            "lm_head": (spec.hidden_size, spec.vocab_size),
        }

    def _check_header(self, raw: bytes, rank: int) -> None:
        """Names, dtypes and shapes, before any tensor is made; every A has its B."""
        header = _header(raw)
        sizes = self._sizes()
        seen: set[tuple[int | None, str, str]] = set()
        for name, entry in header.items():
            layer, part, side = self._place(name, sizes)
            in_size, out_size = sizes[part]
            expected = [rank, in_size] if side == "A" else [out_size, rank]
            if entry.get("shape") != expected:
                raise AdapterRefused(f"{name} has shape {entry.get('shape')}, this base needs {expected}")
            if entry.get("dtype") not in DTYPES:
                raise AdapterRefused(f"{name} has dtype {entry.get('dtype')}, not one of {', '.join(sorted(DTYPES))}")
            seen.add((layer, part, side))
        if not seen:
            raise AdapterRefused(f"{WEIGHTS} holds no LoRA matrices")
        lonely = [(layer, part) for layer, part, side in seen if (layer, part, "BA"["AB".index(side)]) not in seen]
        if lonely:
            raise AdapterRefused(f"{lonely[0][1]} of layer {lonely[0][0]} has only one of its two LoRA matrices")

    def _place(self, name: str, sizes: Mapping[str, tuple[int, int]]) -> tuple[int | None, str, str]:
        match = TENSOR_NAME.fullmatch(name)
        layer = int(match[1]) if match and match[1] else None
        part = (match[2] or match[3]) if match else ""
        known = part in sizes and (layer is None) == (part == "lm_head")
        if match is None or not known or (layer is not None and layer >= self.spec.layers):
            raise AdapterRefused(
                f"tensor {name[:120]!r} has no place in this base; LoRA is served on {', '.join(sizes)}"
            )
        return layer, part, match[4]

    def _assemble(self, digest: str, rank: int, scaling: float, tensors: Mapping[str, torch.Tensor]) -> Adapter:
        sizes = self._sizes()
        placed = {self._place(name, sizes): tensor for name, tensor in tensors.items()}
        for (layer, part, side), tensor in placed.items():
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterRefused(f"lora_{side} of {part} in layer {layer} holds NaN or infinity")
        projections = {}
        for layer in (*range(self.spec.layers), None):
            for fused, parts in PARTS.items():
                if (layer is None) != (fused == "head") or not any((layer, part, "A") in placed for part in parts):
                    continue
                projections[layer, fused] = self._stack(layer, parts, placed, rank, scaling, sizes)
        outs = {fused: (sizes[parts[0]][0], sum(sizes[part][1] for part in parts)) for fused, parts in PARTS.items()}
        return Adapter(digest, rank, projections, outs)

    def _stack(
        self,
        layer: int | None,
        parts: tuple[str, ...],
        placed: Mapping[tuple[int | None, str, str], torch.Tensor],
        rank: int,
        scaling: float,
        sizes: Mapping[str, tuple[int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrices on top of each other; B block-diagonal, transposed, with the scaling folded in (in fp32)."""
        present = [part for part in parts if (layer, part, "A") in placed]
        a = torch.cat([placed[layer, part, "A"].float() for part in present])
        b = torch.zeros(rank * len(present), sum(sizes[part][1] for part in parts))
        column = 0
        for part in parts:
            width = sizes[part][1]
            if part in present:
                row = rank * present.index(part)
                b[row : row + rank, column : column + width] = placed[layer, part, "B"].float().T * scaling
            column += width
        if not bool(torch.isfinite(a.to(self.dtype)).all() and torch.isfinite(b.to(self.dtype)).all()):
            raise AdapterRefused(f"LoRA matrices of {present[0]} in layer {layer} overflow the engine's precision")
        return a, b


def _check_config(config: Mapping[str, Any], max_rank: int) -> tuple[int, float]:
    """Rank and scaling. Anything that would change the arithmetic in a way we do not do is refused by name."""
    if config.get("peft_type") != "LORA":
        raise AdapterRefused(f"peft_type {config.get('peft_type')!r} is not supported; supported: LORA")
    if config.get("bias", "none") != "none":
        raise AdapterRefused(f"bias {config['bias']!r} is not supported; train with bias='none'")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterRefused(f"init_lora_weights {config['init_lora_weights']!r} changes the base weights")
    odd = [key for key, value in config.items() if key not in KNOWN_KEYS and value not in _neutral(key)]
    if odd:
        raise AdapterRefused(f"{CONFIG} uses {', '.join(sorted(odd))}, which the engine does not support")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= max_rank:
        raise AdapterRefused(f"rank {rank!r} is not between 1 and {max_rank}, the slots' rank")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterRefused(f"lora_alpha {alpha!r} is not a number")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _neutral(key: str) -> tuple[object, ...]:
    """Values under which an unknown key asks for nothing."""
    special = {"megatron_core": ("megatron.core",), "qalora_group_size": (16,)}
    return (None, False, [], {}, *special.get(key, ()))


def _verified(path: Path, limit: int, manifest: Mapping[str, Any]) -> bytes:
    files = manifest.get("files")
    promised = files.get(path.name) if isinstance(files, dict) else None
    raw = _read(path, limit)
    if hashlib.sha256(raw).hexdigest() != promised:
        raise AdapterRefused(f"{path.name} does not match the digest in the manifest")
    return raw


def _read(path: Path, limit: int) -> bytes:
    """A regular file's bytes, never through a symbolic link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise AdapterRefused(f"{path.name} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise AdapterRefused(f"{path.name} is not a regular file")
        if info.st_size > limit:
            raise AdapterRefused(f"{path.name} has {info.st_size} bytes, more than the {limit} this base allows")
        return file.read(limit)


def _json_object(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterRefused(f"{name} is not a JSON object")
    return value


def _header(raw: bytes) -> dict[str, dict[str, Any]]:
    """The safetensors header: tensor name to dtype, shape and offsets."""
    if len(raw) < 8:
        raise AdapterRefused(f"{WEIGHTS} is truncated")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > MAX_HEADER_BYTES or length > len(raw) - 8:
        raise AdapterRefused(f"{WEIGHTS} is truncated or not a safetensors file")
    header = _json_object(raw[8 : 8 + length], f"the header of {WEIGHTS}")
    header.pop("__metadata__", None)
    if not all(isinstance(entry, dict) for entry in header.values()):
        raise AdapterRefused(f"the header of {WEIGHTS} is malformed")
    return header
