"""POST /tokenize and /detokenize, as vLLM has them: what the model makes of a text, and back."""

from typing import Any

import msgspec

from engine.text.tokenizer import Tokenizer
from services.errors import InvalidRequest
from services.gateway.bodies import decode
from services.gateway.chat import Message, said
from services.gateway.planning import encode_chat
from services.gateway.tools import Tool, toolbox


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `prompt`, or a chat's `messages` with the `tools` it may call."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


_tokenize: msgspec.json.Decoder[TokenizeBody] = msgspec.json.Decoder(TokenizeBody)
_detokenize: msgspec.json.Decoder[DetokenizeBody] = msgspec.json.Decoder(DetokenizeBody)


def parse_tokenize(raw: bytes) -> TokenizeBody:
    """Raises InvalidRequest."""
    body = decode(_tokenize, raw)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages", param="prompt")
    if body.tools and body.messages is None:
        raise InvalidRequest("tools belong to messages", param="tools")
    return body


def parse_detokenize(raw: bytes) -> DetokenizeBody:
    """Raises InvalidRequest."""
    return decode(_detokenize, raw)


def tokenize(body: TokenizeBody, tokenizer: Tokenizer, max_context: int) -> dict[str, Any]:
    """The answer. Raises InvalidRequest for a chat that the template refuses."""
    if body.messages is None:
        ids = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    else:
        shown = toolbox(body.tools, None, None).shown
        ids = encode_chat(said(body.messages), shown, tokenizer, answer=body.add_generation_prompt is not False)
    strings = (
        [tokenizer.token_bytes(token).decode(errors="replace") for token in ids] if body.return_token_strs else None
    )
    return {"count": len(ids), "max_model_len": max_context, "tokens": ids, "token_strs": strings}


def detokenize(body: DetokenizeBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """The answer. Raises InvalidRequest for an id the model does not have."""
    if any(not 0 <= token < tokenizer.vocab_size for token in body.tokens):
        raise InvalidRequest(f"token ids must be from 0 to {tokenizer.vocab_size - 1}", param="tokens")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
