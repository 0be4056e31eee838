"""Sampling as a person would write it: one row, plain Python, double precision. The reference of the vectorised one."""

import math
from collections.abc import Collection, Sequence

from engine.messages import Sampling

MASK = (1 << 64) - 1


def edited(
    logits: Sequence[float],
    sampling: Sampling,
    prompt: Sequence[int],
    answer: Sequence[int],
    allowed: Collection[int] | None = None,
) -> list[float]:
    """What is left of a row's logits after bias, penalties, early stops and a grammar's allowed tokens."""
    row = []
    for token, logit in enumerate(logits):
        value = logit + sampling.logit_bias.get(token, 0.0)
        if token in prompt or token in answer:
            scale = sampling.repetition_penalty
            value = value / scale if value > 0 else value * scale
        value -= sampling.frequency_penalty * list(answer).count(token)
        value -= sampling.presence_penalty * (token in answer)
        early = token in sampling.stop_token_ids and len(answer) < sampling.min_tokens
        row.append(-math.inf if early or (allowed is not None and token not in allowed) else value)
    return row


def probabilities(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """The distribution a token is drawn from: temperature, min-p, top-k, top-p, each after the one before."""
    best = max(logits)
    weights = [math.exp((logit - best) / sampling.temperature) for logit in logits]
    weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    if 0 < sampling.top_k < len(weights):
        kth = sorted(weights, reverse=True)[sampling.top_k - 1]
        weights = [weight if weight >= kth else 0.0 for weight in weights]
    if sampling.top_p < 1:
        running, target, cut = 0.0, sampling.top_p * sum(weights), 0.0
        for weight in sorted(weights, reverse=True):
            running += weight
            if running >= target:
                cut = weight
                break
        weights = [weight if weight >= cut else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def token(logits: Sequence[float], sampling: Sampling, choice: int, position: int) -> int:
    """The one token these logits give at this position."""
    if sampling.temperature == 0:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    kept = {token: share for token, share in enumerate(probabilities(logits, sampling)) if share > 0}
    return max(kept, key=lambda token: math.log(kept[token]) + noise(sampling.seed, choice, position, token))


def logprob(logits: Sequence[float], token: int) -> float:
    """The model's own log-probability."""
    best = max(logits)
    return logits[token] - best - math.log(sum(math.exp(logit - best) for logit in logits))


def noise(seed: int, choice: int, position: int, token: int) -> float:
    """Gumbel noise of one key."""
    key = _step(_step(seed & MASK) ^ choice)
    key = _step((key + position * 0x9E3779B97F4A7C15) & MASK)
    bits = _mix(_mix((key + token * 0x9E3779B97F4A7C15) & MASK)) & 0xFFFFFFFF
    return -math.log(-math.log((bits + 0.5) * 2.0**-32))


def _step(value: int) -> int:
    return _mix((value + 0x9E3779B97F4A7C15) & MASK)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
