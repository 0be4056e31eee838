"""What an answer must look like: `response_format` and `structured_outputs` to the engine's grammar."""

import json
from typing import Any, Literal

import msgspec

from engine.messages import Grammar
from services.errors import InvalidRequest

LONGEST_GRAMMAR = 64 * 1024
DEEPEST_SCHEMA = 32
MOST_OPTIONS = 1000


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`strict` changes nothing: a schema always holds for the whole answer."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's extension: one of them. `json` is a schema or its text, `grammar` llguidance's Lark."""

    regex: str | None = None
    grammar: str | None = None
    json: dict[str, Any] | str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


def grammar_of(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Grammar | None:
    """What the answer must be, or None. Raises InvalidRequest."""
    by_format = None if response_format is None else _from_format(response_format)
    by_extension = None if structured is None else _from_extension(structured)
    if by_format is not None and by_extension is not None:
        raise InvalidRequest("response_format and structured_outputs exclude each other", param="structured_outputs")
    return by_format or by_extension


def schema_grammar(schema: dict[str, Any], param: str) -> Grammar:
    """A JSON schema as a grammar. Raises InvalidRequest for one too large or too deep."""
    if deeper(schema, DEEPEST_SCHEMA):
        raise InvalidRequest(f"{param} is nested deeper than {DEEPEST_SCHEMA}", param=param)
    return _bounded("json_schema", msgspec.json.encode(schema).decode(), param)


def deeper(value: object, levels: int) -> bool:
    """Whether a JSON value has more than `levels` levels."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(deeper(child, levels - 1) for child in children)


def _from_format(wanted: ResponseFormat) -> Grammar | None:
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return schema_grammar({"type": "object"}, "response_format")
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise InvalidRequest(
            "response_format of type json_schema needs json_schema.schema", param="response_format.json_schema"
        )
    return schema_grammar(wanted.json_schema.schema, "response_format.json_schema.schema")


def _from_extension(wanted: StructuredOutputs) -> Grammar | None:
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) not in (None, False)]
    if not given:
        return None
    name, param = given[0], f"structured_outputs.{given[0]}"
    if len(given) > 1:
        raise InvalidRequest(f"structured_outputs takes one of {', '.join(given)}", param="structured_outputs")
    value = getattr(wanted, name)
    if name == "regex":
        return _bounded("regex", value, param)
    if name == "grammar":
        return _bounded("lark", value, param)
    if name == "choice":
        return _one_of(value, param)
    return schema_grammar({"type": "object"} if name == "json_object" else _schema(value, param), param)


def _schema(value: dict[str, Any] | str, param: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        return msgspec.json.decode(value, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{param} is not the text of a JSON schema", param=param) from error


def _one_of(options: list[str], param: str) -> Grammar:
    """Lark's strings are JSON's."""
    if not 0 < len(options) <= MOST_OPTIONS or "" in options:
        raise InvalidRequest(f"{param} takes 1 to {MOST_OPTIONS} strings that are not empty", param=param)
    return _bounded("lark", f"start: {' | '.join(json.dumps(option) for option in options)}", param)


def _bounded(kind: Literal["json_schema", "regex", "lark"], text: str, param: str) -> Grammar:
    if not text:
        raise InvalidRequest(f"{param} must not be empty", param=param)
    if len(text.encode()) > LONGEST_GRAMMAR:
        raise InvalidRequest(f"{param} is longer than {LONGEST_GRAMMAR} bytes", param=param)
    return Grammar(kind=kind, text=text)
