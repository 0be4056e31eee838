"""A chat's messages as clients send them, brought to the form chat templates take (and the log keeps)."""

from typing import Any, Literal

import msgspec

from services.errors import InvalidRequest
from services.gateway.constraints import DEEPEST_SCHEMA, deeper

MOST_CALLS = 128


class SaidFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


class SaidCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call in an earlier answer. Clients that send back what a stream gave them keep its `index`."""

    function: SaidFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[SaidCall] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None
    function_call: Any = None


def said(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as a template takes them. Raises InvalidRequest naming the first that cannot be shown."""
    if not messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def uses_tools(messages: list[dict[str, Any]]) -> bool:
    """Whether earlier turns called tools, which a template must know how to write."""
    return any(message["role"] == "tool" or "tool_calls" in message for message in messages)


def _message(message: Message, where: str) -> dict[str, Any]:
    if message.audio or message.function_call:
        unsupported = "audio" if message.audio else "function_call"
        raise InvalidRequest(f"{unsupported} is not supported", param=where, code="unsupported_parameter")
    if message.role == "tool":
        return _result(message, where)
    if message.tool_call_id is not None:
        raise InvalidRequest(f"{where}.tool_call_id belongs to role tool only", param=where)
    if message.tool_calls:
        return _calling(message, where)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _content(message.content, where)}


def _result(message: Message, where: str) -> dict[str, Any]:
    if not message.tool_call_id:
        raise InvalidRequest(f"{where}.tool_call_id is missing", param=where)
    name = {} if message.name is None else {"name": message.name}
    return {
        "role": "tool",
        "content": _content(message.content, where),
        "tool_call_id": message.tool_call_id,
        **name,
    }


def _calling(message: Message, where: str) -> dict[str, Any]:
    """Templates write arguments as an object: given their text, they would quote it a second time."""
    calls = message.tool_calls or []
    if message.role != "assistant" or len(calls) > MOST_CALLS:
        raise InvalidRequest(f"{where}.tool_calls: role assistant may have up to {MOST_CALLS}", param=where)
    content = "" if message.content is None else _content(message.content, where)
    return {"role": "assistant", "content": content, "tool_calls": [_call(call, where) for call in calls]}


def _call(call: SaidCall, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{where}: arguments must be the text of a JSON object", param=where) from error
    if deeper(arguments, DEEPEST_SCHEMA):
        raise InvalidRequest(f"{where}: arguments are nested deeper than {DEEPEST_SCHEMA}", param=where)
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _content(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{where}.content is missing", param=where)
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.content: only text parts are supported", param=where)
    return "".join(part["text"] for part in content)
