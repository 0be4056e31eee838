"""Which encoders the engine runs, read from config.json without importing transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.spec import UnsupportedModel

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "DistilBert", "ModernBert")
CLASSIFIER = "ForSequenceClassification"
# What a checkpoint may be called, and the transformers class that runs it. The language model's head is not needed.
ENCODERS: dict[str, str] = {
    **{f"{family}Model": f"{family}Model" for family in FAMILIES},
    **{f"{family}ForMaskedLM": f"{family}Model" for family in FAMILIES},
    **{f"{family}{CLASSIFIER}": f"{family}{CLASSIFIER}" for family in FAMILIES},
}


@dataclass(frozen=True)
class EncoderSpec:
    """`runs` is the transformers class; `labels` name the scores of a classification head; `segments` counts token
    types."""

    architecture: str
    runs: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    segments: int
    pad_id: int
    labels: tuple[str, ...]


def read_encoder_spec(directory: Path) -> EncoderSpec | None:
    """The spec of an encoder's directory; None for other models. Raises UnsupportedModel when config.json is broken."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{directory} holds no readable config.json: {error}") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    if name not in ENCODERS:
        return None
    if config.get("quantization_config"):
        raise UnsupportedModel("quantized checkpoints are not supported; use the bf16 or fp32 weights")
    try:
        return _spec(name, config)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{directory}: config.json lacks or misstates {error}") from error


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """In order; transformers leaves its default of two unnamed ones out of the file."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return tuple(str(names[str(index)]) for index in range(len(names)))
    return tuple(f"LABEL_{index}" for index in range(int(config.get("num_labels", 2))))


def _spec(name: str, config: Mapping[str, Any]) -> EncoderSpec:
    roberta = "Roberta" in name
    pad = config.get("pad_token_id", 1 if roberta else 0)
    # RoBERTa numbers its positions from behind the padding's id.
    positions = int(config["max_position_embeddings"]) - (int(pad) + 1 if roberta else 0)
    segments = 1 if name.startswith(("DistilBert", "ModernBert")) else int(config.get("type_vocab_size", 2))
    return EncoderSpec(
        architecture=name,
        runs=ENCODERS[name],
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["dim" if name.startswith("DistilBert") else "hidden_size"]),
        max_positions=positions,
        segments=segments,
        pad_id=int(pad or 0),
        labels=_labels(config) if name.endswith(CLASSIFIER) else (),
    )
