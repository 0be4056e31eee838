"""OpenAI's JSON: whole answers, and the chunks of a stream.

A chunk's constant part is encoded once a choice, so that a token costs one short string encoding.
"""

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.text.tokenizer import Tokenizer
from engine.text.tools import CallDelta
from services.gateway.bodies import CHAT
from services.gateway.generation import Choice
from services.gateway.logprobs import TextLogprobs, chat_logprobs
from services.gateway.pieces import Piece, Scored
from services.gateway.planning import Plan

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
    said = {
        "x-whet-interaction-id": str(plan.ids[0]),
        "x-whet-origin": "live" if plan.pin is None else "pinned",
        "x-whet-adapter": (choice.adapter or "base") if plan.pin is None else "none",
        "x-whet-generation": str(plan.target.project.generation),
        "x-whet-durability": durability,
    }
    if plan.pin is not None:
        said["x-whet-pin"] = str(plan.pin.id)
    if plan.worked:
        said["x-whet-worked-examples"] = ",".join(str(one.id) for one in plan.worked)
    return said


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of the whole request; each prompt counts once, however many answers it got."""
    firsts = [choice for choice in choices if choice.planned.number == 0]
    prompt = sum(len(choice.planned.prompt) for choice in firsts)
    cached = sum(choice.cached_tokens for choice in firsts)
    completion = sum(len(choice.token_ids) for choice in choices)
    drafted = sum(choice.speculating.drafted_tokens for choice in choices)
    accepted = sum(choice.speculating.accepted_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
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
    listed = [
        {
            "index": choice.index,
            **({"message": _message(choice)} if chat else {"text": choice.content}),
            "logprobs": Scorer(choice, tokenizer).write(choice.scored) if plan.ask.logprobs else None,
            "finish_reason": _finish_reason(choice),
        }
        for choice in choices
    ]
    return encode(head | {"choices": listed, "usage": usage(choices), "whet": _interactions(plan)})


def _message(choice: Choice) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.content, "refusal": None}
    if not choice.calls:
        return message
    calls = [_call_start(choice, number, call.name, call.arguments) for number, call in enumerate(choice.calls)]
    return message | {"content": choice.content or None, "tool_calls": calls}


def _call_start(choice: Choice, number: int, name: str, arguments: str) -> dict[str, Any]:
    """A call's id tells which interaction made it."""
    identity = f"call_{choice.planned.id.hex[-20:]}{number}"
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _finish_reason(choice: Choice) -> str:
    return "tool_calls" if choice.calls and choice.finish_reason == "stop" else choice.finish_reason


class Scorer:
    """Log-probabilities of one choice in its endpoint's shape."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = None if choice.plan.ask.endpoint == CHAT else TextLogprobs(choice, tokenizer)

    def write(self, scored: Scored) -> dict[str, Any]:
        """The object for these tokens; call it in their order."""
        return chat_logprobs(scored, self._tokenizer) if self._text is None else self._text.write(scored)


class ChunkWriter:
    """The chunks of one choice."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        plan = choice.plan
        self._choice = choice
        self._scorer = Scorer(choice, tokenizer) if plan.ask.logprobs else None
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
        """One chunk of text, and one for each stretch of a tool call."""
        logprobs = b"null" if self._scorer is None else encode(self._scorer.write(piece.scored))
        if not piece.calls:
            return self._chunk(piece.text, logprobs)
        chunks = [self._chunk(piece.text, logprobs)] if piece.text or self._scorer is not None else []
        return b"".join(chunks + [self._call(delta) for delta in piece.calls])

    def _chunk(self, text: str, logprobs: bytes) -> bytes:
        return self._before + encode(text) + self._after + logprobs + self._last

    def _call(self, delta: CallDelta) -> bytes:
        if delta.name is None:
            call: dict[str, Any] = {"function": {"arguments": delta.arguments}}
        else:
            call = _call_start(self._choice, delta.number, delta.name, delta.arguments)
        calls = [{"index": delta.number} | call]
        return self._event({"delta": {"tool_calls": calls}, "logprobs": None, "finish_reason": None})

    def ending(self) -> bytes:
        """The chunk that says why it ended."""
        empty: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._event(empty | {"logprobs": None, "finish_reason": _finish_reason(self._choice)})

    def _event(self, choice: dict[str, Any]) -> bytes:
        return event(self._head | {"choices": [{"index": self._choice.index} | choice]})


def usage_chunk(plan: Plan, choices: Sequence[Choice]) -> bytes:
    """The last chunk when `stream_options.include_usage` asks for it."""
    kind = "chat.completion.chunk" if plan.ask.endpoint == CHAT else "text_completion"
    return event(_head(plan, kind) | {"choices": [], "usage": usage(choices), "whet": _interactions(plan)})
