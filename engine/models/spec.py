"""What a decoder is made of, read from a Hugging Face config.json. One spec describes every supported family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnsupportedModel(ValueError):
    """The model asks for something the engine does not do; the message names what it does."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: `kind` default, linear or llama3, with the numbers that kind needs."""

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0


@dataclass(frozen=True)
class DecoderSpec:
    """Shapes and switches of one decoder-only transformer. Sizes in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: RopeSpec
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Width of the attention output, all heads together."""
        return self.heads * self.head_dim


ROPE_KINDS = ("default", "linear", "llama3")


def llama_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Llama and what shares its block: RMSNorm, rotary GQA, SwiGLU."""
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"activation {config['hidden_act']!r} is not supported; supported: silu")
    heads = _size(config, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise UnsupportedModel(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
    bias = bool(config.get("attention_bias", False))
    return DecoderSpec(
        architecture=str(config["architectures"][0]),
        vocab_size=_size(config, "vocab_size"),
        hidden_size=_size(config, "hidden_size"),
        intermediate_size=_size(config, "intermediate_size"),
        layers=_size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or _size(config, "hidden_size") // heads),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        rope=rope_spec(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def rope_spec(config: Mapping[str, Any]) -> RopeSpec:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    if float(given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UnsupportedModel("partial rotary embeddings are not supported; every dimension of a head must rotate")
    spec = RopeSpec(
        kind=kind,
        theta=float(given.get("rope_theta") or config.get("rope_theta") or 10000.0),
        factor=float(given.get("factor", 1.0)),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_positions=int(
            given.get("original_max_position_embeddings") or config.get("max_position_embeddings", 2048)
        ),
    )
    if not all(math.isfinite(value) and value > 0 for value in (spec.theta, spec.factor)):
        raise UnsupportedModel("rope theta and factor must be positive numbers")
    return spec


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"config.json: {name} must be a positive integer, found {value!r}")
    return value
