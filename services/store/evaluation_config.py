"""How a project wants its candidates judged: metrics by name, checks of its own, a judge, margins."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.store import patterns, schemas

# What gates may spend on one held-out part, all looks together.
ALPHA = 0.05
# The slice that has to get better, and the one that no correction is about.
TARGET, BASE_ABILITY = "target", "base-ability"
# Rows that nothing is decided by: what a candidate said where nothing is held out, for its deployment to verify.
RECORD = "record"
# Groups of held-out corrections: fewer are no test.
LEAST_GROUPS = 30
# The names in `worker.gate.metrics`, which the store may not import; a test compares them.
Metric = Literal[
    "exact_match", "json_valid", "schema_valid", "field_f1", "similarity", "likelihood", "checks", "judge"
]  # fmt: skip

# What a metric measures by, as keys of the configuration: without it every answer is equal.
MEASURED_BY: Mapping[str, str] = {"checks": "checks", "judge": "judge", "schema_valid": "response_schema"}


class CheckConfig(BaseModel):
    """One thing every answer has to keep to: a pattern found in it, a pattern not found in it, or a JSON schema."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=60, description="What pages call it.")
    must_match: str | None = Field(None, description="A regular expression that must be found in the answer.")
    must_not_match: str | None = Field(None, description="A regular expression that must not be found in it.")
    json_schema: dict[str, Any] | None = Field(None, description="A JSON schema that the answer must keep.")

    @field_validator("must_match", "must_not_match")
    @classmethod
    def _searchable(cls, pattern: str | None) -> str | None:
        problem = patterns.flaw(pattern) if pattern is not None else None
        if problem:
            raise ValueError(problem)
        return pattern

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if sum(one is not None for one in (self.must_match, self.must_not_match, self.json_schema)) != 1:
            raise ValueError("say exactly one of must_match, must_not_match and json_schema")
        return self

    def passes(self, text: str) -> bool:
        """Whether an answer keeps to it. A schema that cannot be judged by is broken by nobody."""
        if self.must_match is not None:
            return patterns.found(self.must_match, text)
        if self.must_not_match is not None:
            return not patterns.found(self.must_not_match, text)
        return not schemas.fails(text, json.dumps(self.json_schema, sort_keys=True))


class JudgeConfig(BaseModel):
    """A served model that compares two answers. It decides nothing unless `metrics` names `judge` first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("base", min_length=1, max_length=100, description="`base`, a project's slug, or an adapter.")
    rubric: str = Field(min_length=1, max_length=4000, description="What makes an answer better, in words.")


def read_checks(config: dict[str, Any]) -> list[CheckConfig]:
    """The project's checks. Raises ValueError for what an older release let in."""
    return [CheckConfig.model_validate(one) for one in config.get("checks") or []]


def read_judge(config: dict[str, Any]) -> JudgeConfig | None:
    """The project's judge. Raises ValueError."""
    found = config.get("judge")
    return None if found is None else JudgeConfig.model_validate(found)


def undecided(first: str, config: Mapping[str, Any]) -> str | None:
    """Why the metric that comes first would decide nothing, in words; None where it has what it measures by."""
    needed = MEASURED_BY.get(first)
    if needed is None or config.get(needed):
        return None
    return f"{first} comes first and has nothing to decide by: set {needed}, or another metric first"


def least_groups(config: Mapping[str, Any]) -> int:
    """How many groups of held-out corrections the project's gate needs."""
    return int(config.get("min_held_out", LEAST_GROUPS))


def read_margins(config: dict[str, Any]) -> dict[str, float]:
    """Margins of slices that have their own, as differences of scores. Raises ValueError."""
    margins = {name: float(points) / 100 for name, points in (config.get("margins") or {}).items()}
    if any(not 0 <= margin <= 1 for margin in margins.values()):
        raise ValueError("a margin is between 0 and 100 points")
    return margins
