"""Which requests are the same request: the one canonical hash that pins are written and looked up by.

It is taken from what the log keeps, `messages` and effective `parameters`, so that the console hashes a row of
Postgres and the gateway the record it is about to write, and both get the same text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMAT = 1
CHAT = "/v1/chat/completions"
# Everything of the sampling that can change an answer. Left out: the seed, which is drawn unless the caller gave one
# (see `seeded`); how an answer is delivered and logged; where sampling is greedy, what only filters the noise; and a
# token limit that nobody gave, because it shrinks with what else stands in the prompt.
NUMBERS = (
    "temperature", "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens_given", "min_tokens",
)  # fmt: skip
FILTERS = ("top_p", "top_k", "min_p")
TURN_KEYS = frozenset({"role", "content"})


def key_of(endpoint: str, messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> str | None:
    """The request's hash; None for one that pins never serve: no chat, several answers, log-probabilities, tools,
    turns that called tools, endless answers."""
    if endpoint != CHAT or not messages or any(set(message) - TURN_KEYS for message in messages):
        return None
    if any(message["role"] == "tool" or not isinstance(message["content"], str) for message in messages):
        return None
    if parameters.get("n", 1) != 1 or any(parameters.get(name) for name in ("logprobs", "tools", "ignore_eos")):
        return None
    greedy = not parameters.get("temperature")
    document = {
        "format": FORMAT,
        "messages": [[message["role"], _text(message["content"])] for message in messages],
        "numbers": [_number(parameters.get(name)) for name in NUMBERS],
        "filters": None if greedy else [_number(parameters.get(name)) for name in FILTERS],
        "logit_bias": sorted([int(token), float(bias)] for token, bias in (parameters.get("logit_bias") or {}).items()),
        "stop_token_ids": sorted(parameters.get("stop_token_ids") or ()),
        "stop": sorted(_text(one) for one in parameters.get("stop") or ()),
        "grammar": _grammar(parameters.get("grammar")),
    }
    return hashlib.sha256(json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


def seeded(parameters: Mapping[str, Any]) -> bool:
    """Whether the caller asked for one certain draw: a sampled request with a seed of its own."""
    return bool(parameters.get("temperature")) and bool(parameters.get("seed_given"))


def _number(value: object) -> float | None:
    """Postgres gives 1e300 back as a whole number and 2 as 2: one spelling for all."""
    return float(value) if isinstance(value, int | float) else None


def _text(value: object) -> str:
    """As the log keeps it: Postgres holds no NUL."""
    return str(value).replace("\0", "\ufffd")


def _grammar(grammar: Mapping[str, Any] | None) -> list[str] | None:
    return [str(grammar["kind"]), _text(grammar["text"])] if grammar else None
