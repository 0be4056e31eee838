"""How tokens are to be chosen: what a body says of it, within bounds."""

import math
from collections.abc import Sequence

import msgspec

from engine.messages import Sampling
from services.errors import InvalidRequest

MOST_STOPS = 16
LONGEST_STOP = 1000
MOST_BIASES = 300
LARGEST_BIAS = 100
MOST_STOP_TOKENS = 64
SEED_RANGE = 2**63


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a body that choose tokens."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None


def sampling_of(body: SamplingFields, top_logprobs: int) -> Sampling:
    """The body's choice, with `seed` and `max_tokens` 0 for whoever plans to fill in. Raises InvalidRequest."""
    _check(body)
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias or {},
        seed=0,
        max_tokens=0,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        top_logprobs=top_logprobs,
    )


def _check(body: SamplingFields) -> None:
    within("temperature", body.temperature, 0, 2)
    within("top_p", body.top_p, 0, 1)
    within("top_k", body.top_k, -1, 2**31)
    within("min_p", body.min_p, 0, 1)
    within("presence_penalty", body.presence_penalty, -2, 2)
    within("frequency_penalty", body.frequency_penalty, -2, 2)
    within("repetition_penalty", body.repetition_penalty, 0.01, 100)
    within("seed", body.seed, -SEED_RANGE, SEED_RANGE - 1)
    within("min_tokens", body.min_tokens, 0, None)
    if body.top_p == 0:
        raise InvalidRequest("top_p must be above 0", param="top_p")
    if len(body.logit_bias or ()) > MOST_BIASES:
        raise InvalidRequest(f"logit_bias takes at most {MOST_BIASES} tokens", param="logit_bias")
    for bias in (body.logit_bias or {}).values():
        within("logit_bias", bias, -LARGEST_BIAS, LARGEST_BIAS)
    if len(body.stop_token_ids or ()) > MOST_STOP_TOKENS:
        raise InvalidRequest(f"stop_token_ids takes at most {MOST_STOP_TOKENS} tokens", param="stop_token_ids")


def check_tokens(sampling: Sampling, vocabulary: int) -> None:
    """Raise InvalidRequest when the sampling names a token that the vocabulary does not have."""
    for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        if any(not 0 <= token < vocabulary for token in tokens):
            raise InvalidRequest(f"{name} takes token ids from 0 to {vocabulary - 1}", param=name)


def within(name: str, value: float | None, low: float, high: float | None) -> None:
    """Raise InvalidRequest when a value is given and out of bounds."""
    if value is None:
        return
    # Whole numbers come unbounded, and `isfinite` cannot take one that no float holds.
    odd = isinstance(value, float) and not math.isfinite(value)
    if odd or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {allowed}, not {str(value)[:80]}", param=name)


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings. Raises InvalidRequest for too many, or one empty or too long."""
    stops: Sequence[str] = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MOST_STOPS or any(not 0 < len(one) <= LONGEST_STOP for one in stops):
        raise InvalidRequest(
            f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters each", param="stop"
        )
    return tuple(stops)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
