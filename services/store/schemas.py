"""Whether an output keeps the JSON schema that its request or its project asked for.

Schemas and outputs are hostile: a pattern may take for ever to match, references may double with every level, a
reference may name a server. So patterns are left out, nothing is fetched, and a check that takes too many steps
decides nothing.
"""

import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend
from referencing import Registry

MOST_STEPS = 20_000
MOST_CHARACTERS = 200_000
# What runs a stranger's regular expression, or walks the schema without counting.
LEFT_OUT = (
    "pattern", "patternProperties", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "format", "uniqueItems",
)  # fmt: skip
Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]

_steps: ContextVar[list[int]] = ContextVar("steps")


class TooManySteps(Exception):
    """The check was given up."""


def fails(output: str, schema: str) -> bool | None:
    """Whether `output` is no JSON of this schema (a JSON text). None when nothing can be said: a schema that is none,
    that refers to what is not in it, or that takes too long."""
    if len(output) > MOST_CHARACTERS:
        return None
    validator = _validator(schema)
    if validator is None:
        return None
    try:
        value = json.loads(output, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return True
    _steps.set([MOST_STEPS])
    try:
        return not validator.is_valid(value)
    except Exception:
        # The schema is a stranger's: its patterns, references and depth may raise anything, and judge nothing then.
        return None


def schema_of(parameters: dict[str, Any], project: dict[str, Any] | None) -> str | None:
    """The schema an answer was asked to keep, the request's before the project's. Tool calls have their own."""
    if "tools" in parameters:
        return None
    grammar = parameters.get("grammar")
    if isinstance(grammar, dict):
        return str(grammar.get("text")) if grammar.get("kind") == "json_schema" else None
    return None if project is None else json.dumps(project, sort_keys=True)


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON")


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:  # noqa: ANN401 - jsonschema's validators have no common type
    try:
        document = json.loads(schema)
    except (ValueError, RecursionError):
        return None
    return _Bounded(document, registry=Registry()) if isinstance(document, dict | bool) else None


def _metered(keyword: Keyword) -> Keyword:
    def metered(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:  # noqa: ANN401
        left = _steps.get()
        left[0] -= 1
        if left[0] < 0:
            raise TooManySteps
        yield from keyword(validator, wanted, instance, schema) or ()

    return metered


def _additional(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:  # noqa: ANN401
    """Where patterns would decide which properties are additional, nothing is said."""
    if "patternProperties" not in schema:
        yield from KEYWORDS["additionalProperties"](validator, wanted, instance, schema) or ()


KEYWORDS: dict[str, Keyword] = dict(Draft202012Validator.VALIDATORS)
_Bounded = extend(
    Draft202012Validator,
    {name: _metered(keyword) for name, keyword in KEYWORDS.items()}
    | {"additionalProperties": _metered(_additional)}
    | dict.fromkeys(LEFT_OUT, lambda *_: None),
)
