"""From logits to tokens, with noise that is a function of (seed, choice, position, token id) alone.

So a request gives the same tokens alone, in a batch, after preemption and, later, under speculation.
Suffixes: R sampled rows, V vocabulary, N surviving (row, token) pairs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.messages import ErrorCode, Sampling

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Uniforms have 32 bits, so Gumbel noise lies within [-3.2, 22.9]: a token this far below the best cannot win.
NOISE_RANGE = 26.2
# What parameters may be, ends included; names are those of Sampling.
RANGES = (
    ("temperature", 0.0, 100.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 100.0),
    ("top_logprobs", 0, 20),
)
MAX_BIAS = 100.0
# Candidates looked at before a whole row is sorted for top-p.
NUCLEUS_TRY = 256


class Draw(NamedTuple):
    """What one sampled row needs: its request's sampling, its choice index and the position of the new token.

    `behind` is the drafted token it stands behind, if any. Where the row before it drew another, the answer means
    nothing, and may be left out.
    """

    sampling: Sampling
    choice: int
    position: int
    behind: int | None = None


class Fault(NamedTuple):
    """Why a row has no token: its request must end with this code and sentence."""

    code: ErrorCode
    reason: str


class Sampled(NamedTuple):
    """Per row the token, and the log of the model's own probability of it (temperature 1, unfiltered).

    `top` holds each row's most likely (token, logprob) pairs, best first, as many as it asked for; `faults` why a row's
    token must not be used. `sample` leaves both empty; `engine.runner.sampling.draw` fills them, one entry a row.
    """

    token_ids: list[int]
    logprobs: list[float]
    top: Sequence[list[tuple[int, float]]] = ()
    faults: Sequence[Fault | None] = ()


def sample(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> Sampled:
    """One token per row. Logits in any floating dtype; all arithmetic in fp32.

    Temperature first, then min-p, top-k and top-p, each seeing only what the one before it left. Logits may be minus
    infinity; a row with a NaN, plus infinity or nothing finite gives a logprob that is not finite and an arbitrary
    token, and leaves the other rows alone.
    """
    logits_RV = logits_RV.float()
    tokens_R = logits_RV.argmax(-1)
    noisy = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if noisy:
        everything = len(noisy) == len(draws)
        index = torch.tensor(noisy, device=logits_RV.device)
        rows = logits_RV if everything else logits_RV[index]
        tokens_R[index] = _noisy(rows, [draws[row] for row in noisy])
    logprobs_R = logits_RV.gather(1, tokens_R[:, None]).squeeze(1) - logits_RV.logsumexp(-1)
    return Sampled(tokens_R.tolist(), logprobs_R.tolist())


def _noisy(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    device = logits_RV.device
    scaled_RV, floor_R1 = scaled(logits_RV, draws)
    keys_R = row_keys(draws, device)
    # Flat indices throughout: torch's two-dimensional fancy indexing is ten times slower here.
    flat_N = torch.nonzero((scaled_RV >= floor_R1).view(-1)).squeeze(1)
    rows_N = flat_N // scaled_RV.shape[1]
    noise_N = gumbel(keys_R.index_select(0, rows_N), flat_N - rows_N * scaled_RV.shape[1])
    perturbed_RV = torch.full(scaled_RV.shape, float("-inf"), dtype=torch.float64, device=device)
    perturbed_RV.view(-1).index_copy_(0, flat_N, scaled_RV.view(-1).index_select(0, flat_N).double() + noise_N)
    return perturbed_RV.argmax(-1)


def scaled(
    logits_RV: torch.Tensor, draws: Sequence[Draw], lowest: float = -NOISE_RANGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits relative to the row's best, over its temperature, and the floor [R, 1] of those that may be drawn.

    Temperature, min-p, top-k and top-p are in it; nothing below `lowest` may be drawn either. fp32.
    """
    temperatures = torch.tensor([draw.sampling.temperature for draw in draws], device=logits_RV.device)
    # A tiny temperature would overflow to infinity; relative to the best logit it only underflows, which is right.
    scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperatures[:, None].clamp_min(1e-6)
    floor_R1 = torch.tensor(
        [[max(lowest, _min_p_floor(draw.sampling.min_p))] for draw in draws], device=logits_RV.device
    )
    if any(draw.sampling.top_k > 0 for draw in draws):
        floor_R1 = torch.maximum(floor_R1, _top_k_floor(scaled_RV, [draw.sampling.top_k for draw in draws]))
    if any(draw.sampling.top_p < 1 for draw in draws):
        floor_R1 = torch.maximum(floor_R1, _top_p_floor(scaled_RV, floor_R1, [draw.sampling.top_p for draw in draws]))
    return scaled_RV, floor_R1


def row_keys(draws: Sequence[Draw], device: torch.device) -> torch.Tensor:
    """[R] what `gumbel` mixes with the token ids, for each row's request, choice and position."""
    return torch.tensor([_row_key(draw) for draw in draws], device=device)


def _min_p_floor(min_p: float) -> float:
    """How far below the best a token may lie: min_p is a share of the best token's probability."""
    return max(-NOISE_RANGE, math.log(min_p)) if min_p > 0 else -NOISE_RANGE


def own_logprobs(logits_RV: torch.Tensor, token_ids: Sequence[int]) -> list[float]:
    """Per row the log of the model's own probability (temperature 1, unfiltered) of one token."""
    tokens_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    logits_RV = logits_RV.float()
    logprobs_R: list[float] = (logits_RV.gather(1, tokens_R1).squeeze(1) - logits_RV.logsumexp(-1)).tolist()
    return logprobs_R


def most_likely(logits_RV: torch.Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Per row its `counts` most likely (token, own logprob) pairs, best first; of equals the lower id comes first."""
    logits_RV = logits_RV.float()
    best = logits_RV.topk(min(max(counts), logits_RV.shape[1]), dim=-1)
    logprobs_RK = (best.values - logits_RV.logsumexp(-1, keepdim=True)).tolist()
    rows = zip(best.indices.tolist(), logprobs_RK, counts, strict=True)
    return [
        sorted(zip(tokens, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]
        for tokens, logprobs, count in rows
    ]


def _top_k_floor(scaled_RV: torch.Tensor, top_ks: Sequence[int]) -> torch.Tensor:
    """The k-th best value of each row; equal values stay together, so the cut never depends on the batch."""
    vocabulary = scaled_RV.shape[1]
    ks = [min(k, vocabulary) if k > 0 else vocabulary for k in top_ks]
    widest = max((k for k in ks if k < vocabulary), default=0)
    if not widest:
        return scaled_RV.new_full((len(ks), 1), float("-inf"))
    best_RK = scaled_RV.topk(widest, dim=-1).values
    index = torch.tensor([min(k, widest) - 1 for k in ks], device=scaled_RV.device)
    kth_R1 = best_RK.gather(1, index[:, None])
    unlimited = torch.tensor([k == vocabulary for k in ks], device=scaled_RV.device)
    return kth_R1.masked_fill(unlimited[:, None], float("-inf"))


def _top_p_floor(scaled_RV: torch.Tensor, floor_R1: torch.Tensor, top_ps: Sequence[float]) -> torch.Tensor:
    """The value of the token that carries the mass of those at or above `floor` over p."""
    weights_RV = scaled_RV.exp().masked_fill(scaled_RV < floor_R1, 0.0)
    target_R1 = torch.tensor(top_ps, device=scaled_RV.device)[:, None] * weights_RV.sum(-1, keepdim=True)
    cut_R1 = _crossing(weights_RV.topk(min(NUCLEUS_TRY, weights_RV.shape[1]), dim=-1).values, target_R1)
    unlimited_R = torch.tensor([p >= 1 for p in top_ps], device=scaled_RV.device)
    short_R = torch.isinf(cut_R1.squeeze(1)) & ~unlimited_R
    if bool(short_R.any()):
        found_R1 = _crossing(weights_RV[short_R].sort(-1, descending=True).values, target_R1[short_R])
        # A whole sorted row can only miss its target by rounding: then every token stays.
        cut_R1[short_R] = found_R1.nan_to_num(posinf=0.0)
    # Compared in the space of values: exp is monotone, but equal weights may hide different logits.
    lowest_R1 = scaled_RV.masked_fill(weights_RV < cut_R1, float("inf")).amin(-1, keepdim=True)
    return lowest_R1.masked_fill(unlimited_R[:, None], float("-inf"))


def _crossing(best_RK: torch.Tensor, target_R1: torch.Tensor) -> torch.Tensor:
    """The weight whose running sum first reaches the target; infinity where these K do not reach it."""
    mass_RK = best_RK.cumsum(-1)
    crossing_R1 = (mass_RK < target_R1).sum(-1, keepdim=True)
    missed_R1 = crossing_R1 == best_RK.shape[1]
    weight_R1 = best_RK.gather(1, crossing_R1.clamp_max(best_RK.shape[1] - 1))
    return weight_R1.masked_fill(missed_R1, float("inf"))


def gumbel(keys_N: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for (row key, token) pairs: splitmix64 of the two, 32 bits of it, in fp64."""
    bits_N = _mix(_mix(keys_N + tokens_N * _signed(GOLDEN))) & 0xFFFFFFFF
    uniform_N = (bits_N.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform_N))


def _row_key(draw: Draw) -> int:
    """Everything of the noise's key but the token, mixed in plain integers (one per row)."""
    key = _mix_int(draw.sampling.seed & MASK)
    key = _mix_int((key ^ draw.choice) & MASK)
    return _signed(_mix_int((key + draw.position * GOLDEN) & MASK))


def _mix_int(value: int) -> int:
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * MIX_1) & MASK
    value = ((value ^ (value >> 27)) * MIX_2) & MASK
    return value ^ (value >> 31)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, which torch multiplies modulo 2^64; shifts must be made logical by a mask."""
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def invalid_sampling(sampling: Sampling, vocab_size: int | None = None) -> str:
    """Why these parameters cannot be used, as a sentence; empty when they can."""
    for name, lowest, highest in RANGES:
        value = getattr(sampling, name)
        if not (math.isfinite(value) and lowest <= value <= highest):
            return f"{name} must be between {lowest:g} and {highest:g}, not {value:g}"
    if not 0 < sampling.top_p <= 1:
        return f"top_p must be above 0 and at most 1, not {sampling.top_p:g}"
    if sampling.top_k < 0:
        return f"top_k must not be negative, not {sampling.top_k}"
    if sampling.max_tokens < 1:
        return f"max_tokens must be at least 1, not {sampling.max_tokens}"
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        return f"min_tokens must be between 0 and max_tokens ({sampling.max_tokens}), not {sampling.min_tokens}"
    return _invalid_ids(sampling, vocab_size)


def _invalid_ids(sampling: Sampling, vocab_size: int | None) -> str:
    for token, bias in sampling.logit_bias.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            return f"logit_bias must be between -{MAX_BIAS:g} and {MAX_BIAS:g}, not {bias:g} (token {token})"
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            return f"logit_bias names token {token}, which the model does not have"
    return ""
