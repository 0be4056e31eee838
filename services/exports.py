"""Speculators in the formats of other servers: LoRAX's Medusa adapters and vLLM's Medusa draft models. No torch.

Plain Medusa heads have nowhere to keep what ours know besides: whoever exports is told what stays behind.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from services.errors import InvalidRequest, NotFound

Target = Literal["lorax", "vllm-medusa"]
MANIFEST, HEADS, CONFIG, NOTE = "manifest.json", "speculator.safetensors", "config.json", "NOTE.txt"
# What both servers look for in a directory that is no full model.
WEIGHTS = {"lorax": "medusa_lm_head.safetensors", "vllm-medusa": "model.safetensors"}
LEAST_DIGEST = 8

Array = NDArray[Any]


class Exported(NamedTuple):
    """Where the files are, in whole sentences what they lack, and the heads' whole digest."""

    directory: Path
    lost: list[str]
    digest: str


class _Heads(NamedTuple):
    manifest: dict[str, Any]
    tensors: dict[str, Array]


def export(artifacts: Path, digest: str, target: Target, out: Path, *, model: str, vocabulary: int) -> Exported:
    """Write the heads `digest` (or its beginning) for another server into the new directory `out`.

    `model` is the base model's name there, `vocabulary` how many tokens it has. Raises NotFound, InvalidRequest.
    """
    found = _find(artifacts, digest)
    heads = _read(found)
    if heads.manifest["shape"]["recurrent"]:
        raise InvalidRequest("these heads start from one another's states: no Medusa server can run them")
    if out.exists() and any(out.iterdir()):
        raise InvalidRequest(f"{out} is not empty")
    tensors = _lorax(heads) if target == "lorax" else _vllm(heads, vocabulary)
    config = _lorax_config(heads, model) if target == "lorax" else _vllm_config(heads, vocabulary)
    lost = _lost(heads, target, vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS[target], metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / NOTE).write_text("\n".join([f"Heads {heads.manifest['run']} for {model}.", *lost]) + "\n", encoding="utf-8")
    return Exported(out, lost, found.name)


def _find(artifacts: Path, digest: str) -> Path:
    if len(digest) < LEAST_DIGEST or not set(digest) <= set("0123456789abcdef"):
        raise InvalidRequest(f"a digest has {LEAST_DIGEST} to 64 hexadecimal characters")
    found = [path for path in artifacts.iterdir() if path.name.startswith(digest)] if artifacts.is_dir() else []
    if len(found) != 1:
        raise NotFound(f"{len(found) or 'no'} artefacts here begin with {digest}")
    return found[0]


def _read(directory: Path) -> _Heads:
    """The published heads, if they are still what their name and manifest say. Raises InvalidRequest."""
    raw = (directory / MANIFEST).read_bytes()
    if hashlib.sha256(raw).hexdigest() != directory.name:
        raise InvalidRequest(f"the manifest of {directory.name[:12]} was changed")
    manifest = json.loads(raw)
    if manifest.get("kind") != "speculator":
        raise InvalidRequest(f"{directory.name[:12]} is an {manifest.get('kind')}; only speculators are exported")
    weights = (directory / HEADS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != manifest["files"][HEADS]:
        raise InvalidRequest(f"{HEADS} of {directory.name[:12]} was changed")
    return _Heads(manifest, parse(weights))


def parse(raw: bytes) -> dict[str, Array]:
    """Tensors of a safetensors file; bf16, which numpy does not know, as fp32. Raises InvalidRequest."""
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _tensor(raw[8 + length :], entry) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{HEADS} is no safetensors file of heads: {error}") from error


def _tensor(data: bytes, entry: Mapping[str, Any]) -> Array:
    start, end = entry["data_offsets"]
    piece, shape = data[start:end], entry["shape"]
    if entry["dtype"] == "BF16":
        # The upper half of an fp32.
        wide = np.frombuffer(piece, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    return np.frombuffer(piece, dtype={"F32": "<f4", "I32": "<i4"}[entry["dtype"]]).reshape(shape)


def _lorax(heads: _Heads) -> dict[str, Array]:
    """Version 2: residual blocks only, through the base model's own LM head."""
    found: dict[str, Array] = {}
    for head in range(heads.manifest["shape"]["heads"]):
        found[f"{head}.0.linear.weight"] = np.ascontiguousarray(heads.tensors["weight"][head])
        found[f"{head}.0.linear.bias"] = np.ascontiguousarray(heads.tensors["bias"][head])
    return found


def _lorax_config(heads: _Heads, model: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": model,
        "medusa_num_heads": heads.manifest["shape"]["heads"],
        "medusa_num_layers": 1,
        "version": 2,
    }


def _vllm(heads: _Heads, vocabulary: int) -> dict[str, Array]:
    """Residual blocks, one LM head for all of them, and which tokens its rows stand for."""
    found = {"lm_heads.0.weight": np.ascontiguousarray(heads.tensors["head"])}
    for head in range(heads.manifest["shape"]["heads"]):
        found[f"blocks.{head}.layers.0.weight"] = np.ascontiguousarray(heads.tensors["weight"][head])
        found[f"blocks.{head}.layers.0.bias"] = np.ascontiguousarray(heads.tensors["bias"][head])
    if heads.manifest["shape"]["vocabulary"] < vocabulary:
        found["token_map"] = heads.tensors["tokens"].astype(np.int64)
    return found


def _vllm_config(heads: _Heads, vocabulary: int) -> dict[str, Any]:
    shape = heads.manifest["shape"]
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": shape["hidden"],
        "vocab_size": vocabulary,
        "truncated_vocab_size": shape["vocabulary"],
        "num_heads": shape["heads"],
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
        "torch_dtype": "float32",
    }


def _lost(heads: _Heads, target: Target, vocabulary: int) -> list[str]:
    shape = heads.manifest["shape"]
    lost = ["Left behind: the confidence of each draft. That server drafts a fixed number of tokens however unsure."]
    if shape["conditioning"] != "none":
        lost.append(
            "Left behind: what the token before tells each head. Later heads will be right less often than here; "
            "heads trained with conditioning=none lose nothing by this."
        )
    if target == "lorax" and shape["vocabulary"] < vocabulary:
        lost.append(
            f"Left behind: the choice of {shape['vocabulary']} words. That server multiplies the whole LM head of "
            f"{vocabulary} for each drafted token."
        )
    if heads.manifest["adapter"]:
        lost.append(
            f"These heads were trained on the states of adapter {heads.manifest['adapter'][:12]}: serve them with it."
        )
    return lost
