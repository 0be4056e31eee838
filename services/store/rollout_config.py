"""How a candidate that passed the gate reaches a project's traffic: what may be configured, and what the words mean.

A rollout keeps the settings it began with: margins that move while somebody watches the figures are no margins.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.store.conforming import conforms

Signal = Literal["feedback", "implicit", "checks", "logprob"]
# Outcomes of these lie in [0, 1], and differences are told in points; log-probabilities are told in nats.
SHARES: frozenset[str] = frozenset({"feedback", "implicit", "checks"})
SIGNALS: Mapping[str, str] = {
    "feedback": "what apps and end users say of answers",
    "implicit": "answers that nobody broke off, corrected or disliked",
    "checks": "answers that keep to their form",
    "logprob": "mean log-probability of the answers' tokens",
}
# What has to happen for an outcome to come.
NEEDS: Mapping[str, str] = {
    "feedback": (
        "apps have to send ratings, scores or corrections of its answers to POST /v1/feedback. A signal that needs "
        "nothing from them, such as implicit, can be set for the next trial"
    ),
    "implicit": "each of its answers is one, whatever apps send",
    "checks": (
        "an answer is one where its request asks for a form, or where the project has a response schema or a pattern. "
        "A signal that needs none of these, such as implicit, can be set for the next trial"
    ),
    "logprob": "each of its answers is one, whatever apps send",
}


class Shadowing(BaseModel):
    """Prompts that were answered already, answered again by the candidate before anybody is served by it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    requests: int = Field(0, ge=0, le=10_000, description="Prompts run again before the canary; 0 leaves shadow out.")
    most_worse: float = Field(0.05, ge=0, le=1, description="How many more of its answers may fail the checks.")


class Guardrails(BaseModel):
    """By how much the candidate may differ from what serves beside it before it is rolled back; null switches off."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    errors: float | None = Field(0.01, ge=0, le=1, description="More of its requests end in an error.")
    latency: float | None = Field(0.05, ge=0, le=1, description="More of its answers take longer than p95 before.")
    ttft: float | None = Field(0.05, ge=0, le=1, description="More of its first tokens come later than p95 before.")
    length: float | None = Field(2.0, gt=1, le=100, description="Its answers are so many times as long, or as short.")
    refusals: float | None = Field(0.02, ge=0, le=1, description="More of its answers refuse.")
    acceptance: float | None = Field(0.15, ge=0, le=1, description="Fewer of its drafted tokens are accepted.")


class RolloutConfig(BaseModel):
    """A project's `config["rollout"]`; absent keys take these defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mode: Literal["canary", "direct"] = Field("canary", description="`direct` swaps at once, with nobody compared.")
    share: float = Field(0.10, ge=0.01, le=0.5, description="Users whom a canary serves.")
    signal: Signal = Field("feedback", description="What is compared: feedback, implicit, checks or logprob.")
    score_range: tuple[float, float] = Field((0.0, 1.0), description="Worst and best of the apps' scores.")
    pattern: str | None = Field(None, max_length=2000, description="What an answer must match, for `checks`.")
    harm: float = Field(0.05, gt=0, le=1, description="Promoted once it is shown not to be worse by more than this.")
    benefit: float | None = Field(None, ge=0, le=1, description="Promoted only once it is shown to be better by this.")
    least_users: int = Field(10, ge=2, le=100_000, description="Users of each arm before the first decision.")
    least_requests: int = Field(50, ge=10, le=1_000_000, description="Outcomes of each arm before that.")
    freeze_after: int = Field(2, ge=1, le=100, description="Automatic roll-backs until a person has to look.")
    shadow: Shadowing = Field(Shadowing(), description="Answers compared before anybody is served.")
    guardrails: Guardrails = Field(Guardrails(), description="Tolerances.")

    @field_validator("score_range")
    @classmethod
    def _is_a_range(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not ends[0] < ends[1]:
            raise ValueError("the worst score must be below the best")
        return ends

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and not readable(pattern):
            raise ValueError("this is no regular expression that can be matched in linear time")
        return pattern


def readable(pattern: str) -> bool:
    """Whether the matcher takes it: anything that does not conform to it or to its alternative with all else is bad."""
    return conforms({"kind": "regex", "text": f"(?s:.)*|{pattern}"}, "")


def read_rollout(config: Mapping[str, Any]) -> RolloutConfig:
    """The settings in a project's configuration. What was stored by another release is read as far as it is known.

    Values are checked when they are stored; nonsense that got there another way reads as the defaults, which serve
    nobody a candidate unseen.
    """
    stored = config.get("rollout")
    stored = stored if isinstance(stored, dict) else {}
    known = {name: value for name, value in stored.items() if name in RolloutConfig.model_fields}
    try:
        return RolloutConfig.model_validate(known)
    except ValidationError:
        return RolloutConfig()
