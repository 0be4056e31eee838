"""Rotary position embeddings, as in transformers' modeling_rope_utils. Suffixes: P positions, T tokens, H heads, D head
dimension."""

import math

import torch

from engine.models.spec import RopeSpec


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """Angle per position for each of the D/2 pairs, in fp32."""
    turns = spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if spec.kind == "longrope":
        return 1.0 / (torch.tensor(spec.divisors, dtype=torch.float32) * turns)
    plain = 1.0 / turns
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3(plain, spec)
    if spec.kind == "yarn":
        return _yarn(plain, spec, head_dim)
    return plain


def _llama3(plain: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Low frequencies are divided by the factor, high ones kept, those between blended."""
    turns = spec.original_positions * plain / (2 * math.pi)
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    return torch.lerp(plain / spec.factor, plain, blend.clamp(0.0, 1.0))


def _yarn(plain: torch.Tensor, spec: RopeSpec, head_dim: int) -> torch.Tensor:
    """Pairs that turn often within the original context are kept, those that hardly turn divided by the factor."""
    low, high = _pair(spec.beta_fast, spec, head_dim), _pair(spec.beta_slow, spec, head_dim)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # transformers' guard against a division by zero
    divided = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return torch.lerp(plain, plain / spec.factor, divided)


def _pair(rotations: float, spec: RopeSpec, head_dim: int) -> float:
    """Which pair of dimensions turns this many times within the original context, as a fraction."""
    return head_dim * math.log(spec.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))


class Rope:
    """Cosine and signed sine for every position up to `positions`, in the compute dtype, attention scaling included."""

    def __init__(self, spec: RopeSpec, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(spec, head_dim)[None, :]
        cos, sin = angles.cos() * spec.attention_scaling, angles.sin() * spec.attention_scaling
        self._half = head_dim // 2
        # rotate_half puts minus on the first half; carrying the sign in the sine saves a kernel per layer.
        self._cos_PD = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self._sin_PD = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [P, D] of all positions; the sines of the first half of D carry a minus."""
        return self._cos_PD, self._sin_PD

    def at(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines [T, 1, D] of these positions, shared by all layers of a step."""
        return self._cos_PD[positions_T].unsqueeze(1), self._sin_PD[positions_T].unsqueeze(1)

    def rotate_(self, x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> None:
        """Rotate in place."""
        turned_THD = x_THD.roll(self._half, dims=-1)
        x_THD.mul_(cos_T1D).addcmul_(turned_THD, sin_T1D)
