"""Typed values out of a config.json; what is missing takes the default transformers would take."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from engine.models.spec import UnsupportedModel

Config = Mapping[str, Any]
Item = TypeVar("Item")


def size(config: Config, name: str, default: int | None = None) -> int:
    """A positive integer. An explicit null counts as missing."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"config.json: {name} must be a positive integer, found {value!r}")
    return value


def index(config: Config, name: str, default: int) -> int:
    """An integer from 0 up. An explicit null counts as missing."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnsupportedModel(f"config.json: {name} must be an integer from 0 up, found {value!r}")
    return value


def items(config: Config, name: str, kind: type[Item]) -> list[Item] | None:
    """A list of `kind`; None when it is missing or null."""
    value = config.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, kind) for item in value)):
        raise UnsupportedModel(f"config.json: {name} must be a list of {kind.__name__}, found {value!r}")
    return value


def number(config: Config, name: str, default: float | None = None) -> float:
    """A positive, finite number. An explicit null counts as missing."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise UnsupportedModel(f"config.json: {name} must be a positive number, found {value!r}")
    return float(value)


def numbers(config: Config, name: str, count: int) -> tuple[float, ...]:
    """A list of `count` positive, finite numbers."""
    value = config.get(name)
    if not isinstance(value, list) or len(value) != count:
        raise UnsupportedModel(f"config.json: {name} must be a list of {count} positive numbers")
    return tuple(number({name: item}, name) for item in value)
