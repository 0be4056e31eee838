"""The rotary embedding a config.json asks for, as transformers' modeling_rope_utils reads it."""

import math

from engine.models.fields import Config, number, numbers, size
from engine.models.spec import RopeSpec, UnsupportedModel

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_spec(config: Config, head_dim: int, default_theta: float, positions: int) -> RopeSpec:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `positions` is the config's max_position_embeddings. Raises UnsupportedModel.
    """
    given = _given(config)
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in KINDS:
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    theta = number(given, "rope_theta", number(config, "rope_theta", default_theta))
    if theta <= 1:
        raise UnsupportedModel(f"rope_theta must be above 1, found {theta:g}")
    original = original_positions(config, given, positions)
    if kind in ("linear", "dynamic"):
        # dynamic equals default up to max_position_embeddings, where the engine's context ends anyway.
        return RopeSpec(kind, theta, number(given, "factor"), original_positions=positions)
    if kind == "llama3":
        low, high = number(given, "low_freq_factor"), number(given, "high_freq_factor")
        if low == high:
            raise UnsupportedModel("rope type llama3: low_freq_factor and high_freq_factor must differ")
        return RopeSpec(kind, theta, number(given, "factor"), low, high, original)
    if kind == "yarn":
        return _yarn(given, theta, original, positions)
    if kind == "longrope":
        return _longrope(given, theta, original, positions, head_dim)
    return RopeSpec(kind, theta)


def exact_positions(rope: RopeSpec, positions: int) -> int:
    """How much of a context of `positions` can be served exactly.

    LongRoPE swaps all its frequencies, past ones included, once a sequence outgrows the original context; keys already
    in a cache cannot follow, so contexts end there.
    """
    return min(positions, rope.original_positions) if rope.kind == "longrope" else positions


def original_positions(config: Config, given: Config, positions: int) -> int:
    """Context the model was first trained for; a value beside the rope settings wins (Phi-3 writes it there)."""
    if config.get("original_max_position_embeddings") is not None:
        return size(config, "original_max_position_embeddings")
    return size(given, "original_max_position_embeddings", positions)


def _given(config: Config) -> Config:
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UnsupportedModel("config.json: rope_parameters must be an object")
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModel("rope parameters per layer type are not supported; one set must serve all layers")
    if number(given, "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("partial rotary embeddings are not supported; every dimension of a head must rotate")
    return given


def _yarn(given: Config, theta: float, original: int, positions: int) -> RopeSpec:
    """YaRN (arXiv 2309.00071); scaling of attention from `factor`, or from mscale and mscale_all_dim (DeepSeek)."""
    factor = number(given, "factor", positions / original)
    scaling = _magnitude(factor, 1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        scaling = _magnitude(factor, number(given, "mscale")) / _magnitude(factor, number(given, "mscale_all_dim"))
    return RopeSpec(
        "yarn",
        theta,
        factor,
        original_positions=original,
        beta_fast=number(given, "beta_fast", 32.0),
        beta_slow=number(given, "beta_slow", 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_scaling=number(given, "attention_factor", scaling),
    )


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(given: Config, theta: float, original: int, positions: int, head_dim: int) -> RopeSpec:
    """LongRoPE (arXiv 2402.13753) within the original context: its short factors."""
    if original < 2:
        raise UnsupportedModel("rope type longrope: original_max_position_embeddings must be above 1")
    factor = number(given, "factor", positions / original)
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeSpec(
        "longrope",
        theta,
        factor,
        original_positions=original,
        attention_scaling=number(given, "attention_factor", scaling),
        divisors=numbers(given, "short_factor", head_dim // 2),
    )
