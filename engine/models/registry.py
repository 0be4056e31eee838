"""Which architectures the engine runs. Anything else is refused with a sentence naming these."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.models.spec import DecoderSpec, UnsupportedModel, llama_spec

SUPPORTED: dict[str, Callable[[Mapping[str, Any]], DecoderSpec]] = {"LlamaForCausalLM": llama_spec}


def read_spec(directory: Path) -> DecoderSpec:
    """The spec of a model directory. Raises UnsupportedModel, also when there is no usable config.json."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{directory} holds no readable config.json: {error}") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    if name not in SUPPORTED:
        raise UnsupportedModel(f"architecture {name!r} is not supported; supported: {', '.join(sorted(SUPPORTED))}")
    if config.get("quantization_config"):
        raise UnsupportedModel("quantized checkpoints are not supported; use the bf16 or fp32 weights")
    return SUPPORTED[name](config)
