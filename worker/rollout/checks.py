"""Does an answer keep to its form? What the signal `checks` and the shadow comparison ask of every text."""

import json
from collections.abc import Mapping
from typing import Any

from services.store.conforming import conforms
from services.store.rollout_config import RolloutConfig


def passes(
    output: str, parameters: Mapping[str, Any], config: RolloutConfig, response_schema: Mapping[str, Any] | None
) -> bool | None:
    """Whether it conforms to the request's own grammar, the project's schema and the rollout's pattern.

    None where nothing is asked of it.
    """
    wanted: list[Mapping[str, Any]] = []
    grammar = parameters.get("grammar")
    if grammar:
        wanted.append(grammar)
    elif response_schema:
        wanted.append({"kind": "json_schema", "text": json.dumps(response_schema)})
    if config.pattern:
        wanted.append({"kind": "regex", "text": config.pattern})
    return all(conforms(form, output.strip()) for form in wanted) if wanted else None
