"""Which architectures the engine runs. Anything else is refused with a sentence naming these."""

import json
from collections.abc import Callable
from pathlib import Path

from engine.models.families import (
    classifier_spec,
    llama_spec,
    mistral_spec,
    mixtral_spec,
    qwen2_spec,
    qwen3_moe_spec,
    qwen3_spec,
)
from engine.models.fields import Config
from engine.models.spec import DecoderSpec, UnsupportedModel

GENERATORS: dict[str, Callable[[Config], DecoderSpec]] = {
    "LlamaForCausalLM": llama_spec,
    "MistralForCausalLM": mistral_spec,
    "MixtralForCausalLM": mixtral_spec,
    "Qwen2ForCausalLM": qwen2_spec,
    "Qwen3ForCausalLM": qwen3_spec,
    "Qwen3MoeForCausalLM": qwen3_moe_spec,
}
CLASSIFIERS: dict[str, Callable[[Config], DecoderSpec]] = {
    "LlamaForSequenceClassification": llama_spec,
    "MistralForSequenceClassification": mistral_spec,
    "Qwen2ForSequenceClassification": qwen2_spec,
    "Qwen3ForSequenceClassification": qwen3_spec,
}
SUPPORTED = sorted(GENERATORS | CLASSIFIERS)


def read_spec(directory: Path) -> DecoderSpec:
    """The spec of a model directory. Raises UnsupportedModel, also when there is no usable config.json."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{directory} holds no readable config.json: {error}") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in SUPPORTED:
        raise UnsupportedModel(f"architecture {name!r} is not supported; supported: {', '.join(SUPPORTED)}")
    if config.get("quantization_config"):
        raise UnsupportedModel("quantized checkpoints are not supported; use the bf16 or fp32 weights")
    if name in CLASSIFIERS:
        return classifier_spec(CLASSIFIERS[name](config), config)
    return GENERATORS[name](config)
