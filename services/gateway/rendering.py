"""OpenAI's JSON: whole answers, and the chunks of a stream.

A chunk's constant part is encoded once a choice, so that a token costs one short string encoding.
"""

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.text.tokenizer import Tokenizer
from services.gateway.bodies import CHAT
from services.gateway.generation import Choice, Piece
from services.gateway.planning import Plan

REPLACEMENT = "\ufffd"
encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


def answer_id(plan: Plan) -> str:
    """The id a client sees: OpenAI's prefix before the first choice's interaction id."""
    prefix = "chatcmpl" if plan.ask.endpoint == CHAT else "cmpl"
    return f"{prefix}-{plan.ids[0]}"


def headers(plan: Plan, choice: Choice, durability: str) -> dict[str, str]:
    """What an answer says about itself: how to refer to it, which weights made it, what its log survives."""
    return {
        "x-whet-interaction-id": str(plan.ids[0]),
        "x-whet-adapter": choice.adapter or "base",
        "x-whet-generation": str(plan.target.project.generation),
        "x-whet-durability": durability,
    }


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of the whole request; the prompt counts once."""
    prompt = len(choices[0].plan.prompt)
    completion = sum(len(choice.token_ids) for choice in choices)
    cached = max(choice.ending.cached_tokens if choice.ending else 0 for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _head(plan: Plan, kind: str) -> dict[str, Any]:
    return {"id": answer_id(plan), "object": kind, "created": int(time.time()), "model": plan.ask.model}


def _interactions(plan: Plan) -> dict[str, list[str]]:
    """Each choice is an interaction of its own; feedback names one of these."""
    return {"interaction_ids": [str(interaction_id) for interaction_id in plan.ids]}


def whole(plan: Plan, choices: Sequence[Choice], tokenizer: Tokenizer) -> bytes:
    """The body of an answer that is not streamed."""
    chat = plan.ask.endpoint == CHAT
    head = _head(plan, "chat.completion" if chat else "text_completion")
    listed = []
    for choice in choices:
        entry: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        if chat:
            entry["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            entry["text"] = choice.text
        piece = Piece(choice.text, choice.token_ids, choice.logprobs)
        entry["logprobs"] = _logprobs(plan, piece, tokenizer)
        listed.append(entry)
    return encode(head | {"choices": listed, "usage": usage(choices), "whet": _interactions(plan)})


def _logprobs(plan: Plan, piece: Piece, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not plan.ask.logprobs:
        return None
    pairs = [
        (token_id, value)
        for token_id, value in zip(piece.token_ids, piece.logprobs, strict=True)
        if token_id not in tokenizer.eos_ids
    ]
    texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id, _ in pairs]
    values = [value for _, value in pairs]
    if plan.ask.endpoint != CHAT:
        offsets = [sum(map(len, texts[:place])) for place in range(len(texts))]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
    content = [
        {"token": text, "logprob": value, "bytes": _bytes(text), "top_logprobs": []}
        for text, value in zip(texts, values, strict=True)
    ]
    return {"content": content, "refusal": None}


def _bytes(text: str) -> list[int] | None:
    """Unknown when the token is part of a character."""
    return None if REPLACEMENT in text else list(text.encode())


class ChunkWriter:
    """The chunks of one choice."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        plan = choice.plan
        self._choice = choice
        self._tokenizer = tokenizer
        self._chat = plan.ask.endpoint == CHAT
        self._head = _head(plan, "chat.completion.chunk" if self._chat else "text_completion")
        if plan.ask.include_usage:
            # OpenAI: every chunk but the last then says explicitly that it carries no usage.
            self._head["usage"] = None
        content = b'"delta":{"content":' if self._chat else b'"text":'
        start = encode(self._head)[:-1]
        self._before = b"data: " + start + b',"choices":[{"index":%d,' % choice.index + content
        self._after = (b"}" if self._chat else b"") + b',"logprobs":'
        self._last = b',"finish_reason":null}]}\n\n'

    def first(self) -> bytes:
        """Chat streams begin by saying who speaks."""
        if not self._chat:
            return b""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._event({"delta": delta, "logprobs": None, "finish_reason": None})

    def piece(self, piece: Piece) -> bytes:
        """One chunk of text."""
        if self._choice.plan.ask.logprobs:
            logprobs = encode(_logprobs(self._choice.plan, piece, self._tokenizer))
        else:
            logprobs = b"null"
        return self._before + encode(piece.text) + self._after + logprobs + self._last

    def ending(self) -> bytes:
        """The chunk that says why it ended."""
        empty: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._event(empty | {"logprobs": None, "finish_reason": self._choice.finish_reason})

    def _event(self, choice: dict[str, Any]) -> bytes:
        return event(self._head | {"choices": [{"index": self._choice.index} | choice]})


def usage_chunk(plan: Plan, choices: Sequence[Choice]) -> bytes:
    """The last chunk when `stream_options.include_usage` asks for it."""
    kind = "chat.completion.chunk" if plan.ask.endpoint == CHAT else "text_completion"
    return event(_head(plan, kind) | {"choices": [], "usage": usage(choices), "whet": _interactions(plan)})
