"""Request bodies as clients send them, checked and brought to one form.

Fields that would change an answer's meaning and that we do not honour are refused by name; those OpenAI documents and
that cannot change it are ignored; unknown ones are refused, because a mistyped `temperature` is not a detail.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from engine.messages import Grammar, Priority, Sampling
from services.errors import InvalidRequest
from services.gateway.chat import Message, said
from services.gateway.constraints import ResponseFormat, StructuredOutputs, deeper, grammar_of
from services.gateway.sampling import SamplingFields, sampling_of, stops_of, within
from services.gateway.tools import Tool, Toolbox, ToolChoice, toolbox

MOST_CHOICES = 8
MOST_PROMPTS = 64
MOST_LOGPROBS = 20
SHORTEST_TIMEOUT, LONGEST_TIMEOUT = 0.001, 86_400.0
NO_TOOLS = Toolbox()
LONGEST_LABEL = 512
DEEPEST_EXTRA = 16
MOST_TAGS = 64
# Every answer is logged with all of its prompt and of `whet`, so one request must not be many.
MOST_ANSWERS = 128
LONGEST_RETRIEVED = 64 * 1024
Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Endpoint = "/v1/chat/completions"
TEXT: Endpoint = "/v1/completions"
Label = Annotated[str, msgspec.Meta(max_length=LONGEST_LABEL)]


class Extra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `whet` object: what later diagnosis needs and OpenAI has no word for."""

    session: Label | None = None
    group: Label | None = None
    tags: dict[Label, Label | int | float | bool | None] = {}
    retrieved: list[Any] = []


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. `timeout` (seconds), `priority` and `structured_outputs` are not OpenAI's."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    timeout: float | None = None
    priority: Priority | None = None
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


class ChatBody(Common, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Refused unless neutral: honouring them silently wrongly would be worse than an error.
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
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None


# What leaves the answer as it is; absent and null always do.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One checked request. A chat has `messages`, a plain completion `prompts`, each a text or token ids.

    `max_tokens` None means the default; 0 (with `echo` only) that nothing is generated. `sampling` still lacks its
    seed, its token limit and the model's own stop tokens.
    """

    endpoint: Endpoint
    model: str
    messages: list[dict[str, Any]]
    prompts: tuple[str | list[int], ...]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    logprobs: bool
    echo: bool
    ignore_eos: bool
    sampling: Sampling
    seed: int | None
    grammar: Grammar | None
    tools: Toolbox
    timeout: float | None
    priority: Priority
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
    messages = said(body.messages)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens disagree", param="max_tokens")
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    within("max_tokens", limit, 1, None)
    within("top_logprobs", body.top_logprobs, 0, MOST_LOGPROBS)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs=true", param="top_logprobs")
    tools = toolbox(body.tools, body.tool_choice, body.parallel_tool_calls)
    return _ask(
        CHAT, body, messages=messages, max_tokens=limit, logprobs=bool(body.logprobs), tools=tools,
        top_logprobs=body.top_logprobs or 0,
    )  # fmt: skip


def parse_text(raw: bytes) -> Ask:
    """A plain completion request. Raises InvalidRequest."""
    body = decode(_text, raw)
    # OpenAI allows to generate nothing when the prompt is echoed: that is how a text's own log-probabilities are asked.
    within("max_tokens", body.max_tokens, 0 if body.echo else 1, None)
    within("logprobs", body.logprobs, 0, MOST_LOGPROBS)
    return _ask(
        TEXT, body, prompts=_prompts(body.prompt), max_tokens=body.max_tokens, logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0, echo=bool(body.echo),
    )  # fmt: skip


def _ask(
    endpoint: Endpoint,
    body: Common,
    *,
    max_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
    messages: list[dict[str, Any]] | None = None,
    prompts: tuple[str | list[int], ...] = (),
    echo: bool = False,
    tools: Toolbox = NO_TOOLS,
) -> Ask:
    _refuse_unsupported(body)
    within("n", body.n, 1, MOST_CHOICES)
    if len(prompts) * (body.n or 1) > MOST_ANSWERS:
        raise InvalidRequest(f"prompt and n ask for more than {MOST_ANSWERS} answers", param="n")
    within("timeout", body.timeout, SHORTEST_TIMEOUT, LONGEST_TIMEOUT)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream=true", param="stream_options")
    grammar = grammar_of(body.response_format, body.structured_outputs)
    if grammar is not None and tools.shown:
        raise InvalidRequest("an answer cannot be held to a format and call tools too", param="tools")
    extra = body.whet or Extra()
    _check_extra(extra)
    return Ask(
        endpoint=endpoint,
        model=body.model,
        messages=messages or [],
        prompts=prompts,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        max_tokens=max_tokens,
        n=body.n or 1,
        stop=stops_of(body.stop),
        logprobs=logprobs,
        echo=echo,
        ignore_eos=bool(body.ignore_eos),
        sampling=sampling_of(body, top_logprobs if logprobs else 0),
        seed=body.seed,
        grammar=grammar,
        tools=tools,
        timeout=body.timeout,
        priority=body.priority or "interactive",
        user=body.user or None,
        extra=extra,
    )


def _refuse_unsupported(body: Common) -> None:
    for name in body.__struct_fields__:
        if name in NEUTRAL:
            value = getattr(body, name)
            if value is not None and value not in NEUTRAL[name]:
                raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")


def _prompts(prompt: str | list[Any]) -> tuple[str | list[int], ...]:
    """One text, one list of token ids, or a list of either."""
    several = isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt)
    prompts = tuple(prompt) if several else (prompt,)
    if len(prompts) > MOST_PROMPTS:
        raise InvalidRequest(f"prompt takes at most {MOST_PROMPTS} prompts", param="prompt")
    if not all(isinstance(one, str) or (one and all(type(token) is int for token in one)) for one in prompts):
        raise InvalidRequest("prompt is a string, a list of token ids, or a list of either", param="prompt")
    return prompts


def _check_extra(extra: Extra) -> None:
    if len(extra.tags) > MOST_TAGS:
        raise InvalidRequest(f"whet.tags takes at most {MOST_TAGS} tags", param="whet.tags")
    if deeper(extra.retrieved, DEEPEST_EXTRA):
        raise InvalidRequest(f"whet.retrieved is nested deeper than {DEEPEST_EXTRA}", param="whet.retrieved")
    if len(msgspec.json.encode(extra.retrieved)) > LONGEST_RETRIEVED:
        raise InvalidRequest(f"whet.retrieved is longer than {LONGEST_RETRIEVED} bytes", param="whet.retrieved")
