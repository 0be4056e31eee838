"""Weights from safetensors files, single or sharded, each shape checked; nothing unread is silently dropped."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from engine.models.spec import UnsupportedModel

# Buffers some exporters write although they are computed, not learned.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
# Anything narrower is quantized and means nothing without its scales.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """Named tensors of a model directory, memory-mapped and converted to one dtype as they are taken."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._directory = directory
        self._dtype = dtype
        self._stack = ExitStack()
        self._where = self._index()
        self._taken: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor. Raises UnsupportedModel when it is missing or has another shape."""
        if name not in self._where:
            raise UnsupportedModel(f"{self._directory}: weight {name} is missing")
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModel(
                f"{self._directory}: weight {name} is {tuple(tensor.shape)}, config.json says {shape}"
            )
        if tensor.dtype not in FLOATS:
            raise UnsupportedModel(f"{self._directory}: weight {name} is {tensor.dtype}; use the bf16 or fp32 weights")
        self._taken.add(name)
        return tensor.to(self._dtype)

    def ignore(self, name: str) -> None:
        """Say that a tensor is knowingly unused."""
        self._taken.add(name)

    def finish(self) -> None:
        """Raise when the files hold weights nobody took: running without them would be quietly wrong."""
        left = [name for name in self._where if name not in self._taken and not name.endswith(IGNORED_SUFFIXES)]
        if left:
            raise UnsupportedModel(f"{self._directory}: weights not understood: {', '.join(sorted(left)[:5])}")

    def _index(self) -> dict[str, Any]:
        files = self._files()
        where: dict[str, Any] = {}
        for file in files:
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UnsupportedModel(f"{file} is not a readable safetensors file: {error}") from error
            where.update(dict.fromkeys(opened.keys(), opened))
        return where

    def _files(self) -> list[Path]:
        index = self._directory / "model.safetensors.index.json"
        if index.exists():
            names = _shards(index)
            if any(Path(name).name != name for name in names):
                raise UnsupportedModel(f"{index} names a file outside its directory")
            return [self._directory / name for name in sorted(names)]
        files = sorted(self._directory.glob("*.safetensors"))
        if not files:
            raise UnsupportedModel(f"{self._directory} holds no safetensors weights (other formats are not read)")
        return files


def _shards(index: Path) -> set[str]:
    """The file names in model.safetensors.index.json."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnsupportedModel(f"{index} is not a readable index of weight files: {error}") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise UnsupportedModel(f"{index} names no weight files")
    return names
