"""Request bodies as clients send them, checked and brought to one form.

Fields that would change an answer's meaning and that we do not honour are refused by name; those OpenAI documents and
that cannot change it are ignored; unknown ones are refused, because a mistyped `temperature` is not a detail.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from services.errors import InvalidRequest

MOST_CHOICES = 8
MOST_STOPS = 16
LONGEST_STOP = 1000
LONGEST_LABEL = 512
DEEPEST_EXTRA = 16
MOST_TAGS = 64
Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Endpoint = "/v1/chat/completions"
TEXT: Endpoint = "/v1/completions"
Label = Annotated[str, msgspec.Meta(max_length=LONGEST_LABEL)]


class Extra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `whet` object: what later diagnosis needs and OpenAI has no word for."""

    session: Label | None = None
    group: Label | None = None
    tags: dict[Label, str | int | float | bool | None] = {}
    retrieved: list[Any] = []


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    user: Label | None = None
    ignore_eos: bool | None = None
    whet: Extra | None = None
    # Ignored: they say nothing about the answer.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    # Refused unless neutral: honouring them silently wrongly would be worse than an error.
    response_format: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    min_p: Any = None
    min_tokens: Any = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class ChatBody(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class TextBody(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[Any]
    logprobs: int | None = None
    echo: Any = None
    best_of: Any = None
    suffix: Any = None


# What leaves the answer as it is; absent and null always do.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "top_logprobs": (0,),
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One checked request. `prompt` is token ids where the client sent them; `max_tokens` None means the default."""

    endpoint: Endpoint
    model: str
    messages: list[dict[str, Any]]
    prompt: str | list[int] | None
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    n: int
    stop: tuple[str, ...]
    logprobs: bool
    ignore_eos: bool
    user: str | None
    extra: Extra


Body = TypeVar("Body")
_chat: msgspec.json.Decoder[ChatBody] = msgspec.json.Decoder(ChatBody)
_text: msgspec.json.Decoder[TextBody] = msgspec.json.Decoder(TextBody)


def decode(decoder: msgspec.json.Decoder[Body], raw: bytes) -> Body:
    """Parse a JSON body. Raises InvalidRequest saying what is wrong and, where known, in which field."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.strip("`.") or None
        raise InvalidRequest(f"{param}: {message}" if param else message, param=param) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("the request body is not UTF-8", code="invalid_encoding") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the request body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("the request body is nested too deeply", code="invalid_json") from error


def parse_chat(raw: bytes) -> Ask:
    """A chat completion request. Raises InvalidRequest."""
    body = decode(_chat, raw)
    if not body.messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens disagree", param="max_tokens")
    messages = [_message(message, index) for index, message in enumerate(body.messages)]
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    return _ask(CHAT, body, messages, None, limit, bool(body.logprobs))


def parse_text(raw: bytes) -> Ask:
    """A plain completion request. Raises InvalidRequest."""
    body = decode(_text, raw)
    prompt = _prompt(body.prompt)
    if body.logprobs is not None and body.logprobs != 0:
        raise InvalidRequest("only logprobs=0, the chosen token's, is supported", param="logprobs")
    return _ask(TEXT, body, [], prompt, body.max_tokens, body.logprobs is not None)


def _ask(
    endpoint: Endpoint,
    body: Common,
    messages: list[dict[str, Any]],
    prompt: str | list[int] | None,
    max_tokens: int | None,
    logprobs: bool,
) -> Ask:
    _refuse_unsupported(body)
    _within("max_tokens", max_tokens, 1, None)
    _within("temperature", body.temperature, 0, 2)
    _within("top_p", body.top_p, 0, 1)
    _within("top_k", body.top_k, -1, None)
    _within("n", body.n, 1, MOST_CHOICES)
    _within("seed", body.seed, -(2**63), 2**63 - 1)
    if body.top_p == 0:
        raise InvalidRequest("top_p must be above 0", param="top_p")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream=true", param="stream_options")
    extra = body.whet or Extra()
    _check_extra(extra)
    return Ask(
        endpoint=endpoint,
        model=body.model,
        messages=messages,
        prompt=prompt,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=max(0, body.top_k or 0),
        seed=body.seed,
        n=body.n or 1,
        stop=_stops(body.stop),
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
        user=body.user or None,
        extra=extra,
    )


def _refuse_unsupported(body: Common) -> None:
    for name in body.__struct_fields__:
        if name in NEUTRAL:
            value = getattr(body, name)
            if value is not None and value not in NEUTRAL[name]:
                raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")


def _within(name: str, value: float | None, low: float, high: float | None) -> None:
    if value is None:
        return
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {allowed}, not {value}", param=name)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops: Sequence[str] = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MOST_STOPS or any(not 0 < len(one) <= LONGEST_STOP for one in stops):
        raise InvalidRequest(
            f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters each", param="stop"
        )
    return tuple(stops)


def _message(message: Message, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.role in ("tool", "function") or message.tool_calls or message.function_call or message.tool_call_id:
        raise InvalidRequest("tool calls are not supported", param=where, code="unsupported_parameter")
    if message.audio:
        raise InvalidRequest("audio is not supported", param=where, code="unsupported_parameter")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _content(message.content, where)}


def _content(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{where}.content is missing", param=where)
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.content: only text parts are supported", param=where)
    return "".join(part["text"] for part in content)


def _prompt(prompt: str | list[Any]) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and isinstance(prompt[0], str | list):
        return _prompt(prompt[0])
    if all(type(token) is int for token in prompt) and prompt:
        return prompt
    raise InvalidRequest("prompt must be one string or one list of token ids", param="prompt")


def _check_extra(extra: Extra) -> None:
    if len(extra.tags) > MOST_TAGS:
        raise InvalidRequest(f"whet.tags takes at most {MOST_TAGS} tags", param="whet.tags")
    if _deeper(extra.retrieved, DEEPEST_EXTRA):
        raise InvalidRequest(f"whet.retrieved is nested deeper than {DEEPEST_EXTRA}", param="whet.retrieved")


def _deeper(value: object, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(child, levels - 1) for child in children)
