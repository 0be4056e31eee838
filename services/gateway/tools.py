"""Tools a chat may call: what the request says of them, and the grammar that makes a forced call valid."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

from engine.messages import Grammar
from services.errors import InvalidRequest
from services.gateway.constraints import schema_grammar

MOST_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ANYTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`strict` changes nothing: forced calls always keep to their schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Named


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class Forced(NamedTuple):
    """The tools of which one must be called."""

    tools: tuple[Function, ...]

    def grammar(self, argument_key: str) -> Grammar:
        """One call of one of them. Raises InvalidRequest when their schemas together are too large or too deep.

        Each schema becomes a definition of its own, because its references count from its own root.
        """
        roots = {f"tool{place}": tool.parameters or ANYTHING for place, tool in enumerate(self.tools)}
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, argument_key: {"$ref": f"#/$defs/{root}"}},
                "required": ["name", argument_key],
                "additionalProperties": False,
            }
            for tool, root in zip(self.tools, roots, strict=True)
        ]
        definitions = {root: _moved(schema, root) for root, schema in roots.items()}
        choice = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return schema_grammar({**choice, "$defs": definitions}, "tools")


@dataclass(frozen=True)
class Toolbox:
    """The tools as the template gets them; empty when none may be called. `most` limits the calls of an answer, `said`
    is what the request said of calling, for the log."""

    shown: tuple[dict[str, Any], ...] = ()
    forced: Forced | None = None
    most: int | None = None
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that may be called."""
        if self.forced is not None:
            return tuple(tool.name for tool in self.forced.tools)
        return tuple(tool["function"]["name"] for tool in self.shown)


def toolbox(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> Toolbox:
    """What a request may call. Raises InvalidRequest."""
    functions = [tool.function for tool in tools or ()]
    _check(functions)
    given = {"tool_choice": msgspec.to_builtins(choice), "parallel_tool_calls": parallel}
    said = {name: value for name, value in given.items() if value is not None}
    if not functions:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        return Toolbox(said=said)
    if choice == "none":
        return Toolbox(said=said)
    shown = tuple({"type": "function", "function": msgspec.to_builtins(function)} for function in functions)
    forced = _forced(functions, choice)
    return Toolbox(shown, forced, 1 if forced is not None or parallel is False else None, said)


def _check(functions: list[Function]) -> None:
    if len(functions) > MOST_TOOLS:
        raise InvalidRequest(f"tools takes at most {MOST_TOOLS} tools", param="tools")
    names = [function.name for function in functions]
    if bad := next((name for name in names if not NAME.fullmatch(name)), None):
        raise InvalidRequest(f"{bad[:80]!r} is no tool's name: up to 64 letters, digits, _, - and .", param="tools")
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    for function in functions:
        if function.parameters is not None:
            schema_grammar(function.parameters, "tools")


def _forced(functions: list[Function], choice: ToolChoice | None) -> Forced | None:
    if choice == "required":
        return Forced(tuple(functions))
    if not isinstance(choice, NamedChoice):
        return None
    named = tuple(function for function in functions if function.name == choice.function.name)
    if not named:
        raise InvalidRequest(
            f"tool_choice names {choice.function.name[:80]!r}, which is not in tools", param="tool_choice"
        )
    return Forced(named)


def _moved(schema: Any, root: str) -> Any:  # noqa: ANN401 - JSON in, JSON out
    """The schema with its own references counted from its new place."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{root}{reference[1:]}"
    return moved
