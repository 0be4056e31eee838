"""What a project may be configured with: every key, its type and its range. Kept as JSON in `project.config`."""

import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from services.errors import InvalidRequest
from services.store.evaluation_config import MEASURED_BY, CheckConfig, JudgeConfig, Metric, undecided
from services.store.instant_config import PinConfig, WorkedConfig
from services.store.pii import Mode
from services.store.rollout_config import RolloutConfig
from services.store.run_params import check_config
from services.store.sampling import check_mix
from services.store.speculation import SpeculationConfig
from services.store.train_when import TrainWhen


class ProjectConfig(BaseModel):
    """Absent keys take their reader's default, so only what somebody chose is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tags: list[str] | None = Field(None, max_length=40, description="What reviewers may tag an answer with.")
    guidelines: str | None = Field(None, max_length=20_000, description="What reviewers read beside an answer.")
    blind_review: bool | None = Field(None, description="Hide weights and queue reason until a judgement is stored.")
    gold_share: float | None = Field(None, ge=0, le=0.5, description="Share of a reviewer's items that are gold.")
    held_out_share: float | None = Field(None, ge=0, le=0.9, description="Share of groups kept for evaluation.")
    window_seconds: int | None = Field(None, ge=1, le=30 * 86_400, description="Length of a sampling window.")
    window_grace_seconds: int | None = Field(None, ge=0, le=86_400, description="Wait for late rows of a window.")
    review_budget: int | None = Field(None, ge=0, le=100_000, description="Answers chosen for review per window.")
    uniform_share: float | None = Field(None, ge=0, le=1, description="Share of the budget drawn uniformly.")
    strategy_mix: dict[str, float] | None = Field(None, description="Every strategy's share of the budget.")
    second_share: float | None = Field(None, ge=0, le=1, description="Share of prompts asked again, to compare.")
    response_schema: dict[str, Any] | None = Field(None, description="JSON schema that answers have to keep.")
    accepted_share: float | None = Field(None, ge=0, le=1, description="Largest share of accepted rows in training.")
    author_share: float | None = Field(None, gt=0, le=1, description="Largest share of training rows by one person.")
    pair_days: float | None = Field(None, ge=0, le=3650, description="Weights gone longer than this give no pairs.")
    pii: Mode | None = Field(None, description="Personal data in examples: left, marked (tag) or replaced (mask).")
    pii_names: bool | None = Field(None, description="Names and places too, by Presidio (the extra `pii`).")
    margin_points: float | None = Field(None, ge=0, le=100, description="How much worse a guarded slice may get.")
    min_held_out: int | None = Field(None, ge=2, description="Fewer held-out groups than this decide nothing.")
    margins: dict[str, Annotated[float, Field(ge=0, le=100)]] | None = Field(
        None, description="Margins, in points, of slices that have their own."
    )
    checks: list[CheckConfig] | None = Field(
        None, max_length=20, description="What every answer has to keep to: patterns and JSON schemas, by name."
    )
    judge: JudgeConfig | None = Field(None, description="A served model that compares candidate and incumbent.")
    metrics: list[Metric] | None = Field(None, min_length=1, description="What the gate scores by; the first decides.")
    train: dict[str, Any] | None = Field(None, description="Training parameters that differ from the defaults.")
    train_when: TrainWhen | None = Field(None, description="Runs that begin by themselves.")
    max_tokens_default: int | None = Field(None, ge=1, description="Completion length when a request names none.")
    embeddings_kept: int | None = Field(
        None, ge=0, le=1_000_000, description="Newest answers that search by meaning knows; 0 makes no vectors."
    )
    speculation: SpeculationConfig | None = Field(None, description="Drafting, and when its heads are trained.")
    pinned_answers: PinConfig | None = Field(None, description="Approved answers served to identical requests.")
    worked_examples: WorkedConfig | None = Field(None, description="Nearest corrections placed in the prompt.")
    rollout: RolloutConfig | None = Field(None, description="How a candidate that passed the gate reaches traffic.")

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_stored(cls, value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
        if not _storable(value):
            raise ValueError("this holds a character or a number that cannot be stored")
        return value

    @field_validator("checks")
    @classmethod
    def _checks_are_told_apart(cls, checks: list[CheckConfig] | None) -> list[CheckConfig] | None:
        names = [check.name for check in checks or []]
        if len(set(names)) < len(names):
            raise ValueError("two checks have the same name")
        return checks

    @field_validator("metrics")  # after the fields it looks at
    @classmethod
    def _the_first_can_decide(cls, metrics: list[Metric] | None, info: ValidationInfo) -> list[Metric] | None:
        # What is wrong in itself is absent here, and told of already.
        held = {key: info.data.get(key, True) for key in MEASURED_BY.values()}
        if metrics and (problem := undecided(metrics[0], held)):
            raise ValueError(problem)
        return metrics

    @field_validator("strategy_mix")
    @classmethod
    def _audit_is_locked(cls, mix: dict[str, float] | None) -> dict[str, float] | None:
        if mix is not None:
            check_mix(mix)
        return mix

    @field_validator("train")
    @classmethod
    def _parameters_exist(cls, train: dict[str, Any] | None) -> dict[str, Any] | None:
        if train is not None:
            check_config(train)
        return train


# Keys that hold keys of their own.
NESTED: dict[str, type[BaseModel]] = {
    "speculation": SpeculationConfig, "checks": CheckConfig, "judge": JudgeConfig, "rollout": RolloutConfig,
    "pinned_answers": PinConfig, "worked_examples": WorkedConfig, "train_when": TrainWhen,
}  # fmt: skip


def _storable(value: object) -> bool:
    """Whether Postgres takes it as JSON: no NUL, no half of a surrogate pair, no number that is none."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
        text.encode()
    except ValueError:
        return False
    return re.search(r"(?<!\\)(?:\\\\)*\\u0000", text) is None


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as stored. Raises InvalidRequest naming the first bad key."""
    try:
        # A null further in is somebody's word: it switches a guardrail off.
        said = ProjectConfig.model_validate(config).model_dump(mode="json", exclude_unset=True)
        return {key: value for key, value in said.items() if value is not None}
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(NESTED.get(str(first["loc"][0]), ProjectConfig).model_fields)
        hint = f" (known: {known})" if first["type"] == "extra_forbidden" else ""
        raise InvalidRequest(
            f"project configuration {name}: {first['msg'].removeprefix('Value error, ')}{hint}", param=f"config.{name}"
        ) from error
