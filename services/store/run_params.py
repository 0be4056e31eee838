"""How each kind of run trains: parameters with their defaults and ranges, checked at the door.

A kind is a class here, its rows in `worker.training.rows` and its trainer in `worker.training.trainers`. The defaults
of dpo and kto are those of docs/training.md, found on train splits of the starter's applications.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.errors import InvalidRequest
from services.store.datasets import NAME
from services.store.evaluation_config import BASE_ABILITY

AdapterKind = Literal["sft", "dpo", "kto"]
Kind = Literal["sft", "dpo", "kto", "speculator"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ADAPTER_KINDS: tuple[AdapterKind, ...] = get_args(AdapterKind)
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERY_LINEAR: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOST_TRIALS = 16
NOT_TAUGHT = f"{BASE_ABILITY} measures what an adapter forgets, so no run is trained on it"
Params = TypeVar("Params", bound=BaseModel)


class TrainParams(BaseModel):
    """What every run that trains an adapter is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, le=256, description="Rank of the adapter; the engine's slots limit it.")
    alpha: float = Field(32.0, gt=0, le=1024, description="The adapter's scale is alpha ÷ rank.")
    lr: float = Field(2e-3, gt=0, le=0.1, description="Highest learning rate; it rises, then falls as a cosine.")
    epochs: float = Field(4.0, gt=0, le=100, description="How often every example is seen.")
    max_steps: int = Field(0, ge=0, le=100_000, description="Stops the run early; 0 leaves it to the epochs.")
    batch_size: int = Field(8, ge=1, le=256, description="Examples a step and device.")
    warmup: float = Field(0.05, ge=0, le=0.5, description="Share of the steps over which the rate rises.")
    max_length: int = Field(1024, ge=16, le=131_072, description="Longest prompt plus answer, in tokens.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Order of the examples and start of the adapter.")
    targets: tuple[Target, ...] = Field(EVERY_LINEAR, min_length=1, description="Which layers get an adapter.")
    replay: float = Field(0.1, ge=0, le=0.5, description="Share of the rows that are older examples, if there are any.")
    replay_from: str = Field(
        "", pattern=f"^$|{NAME}", description="Data set replayed; empty: what earlier adapters that went live learned."
    )
    validation: float = Field(
        0.1, ge=0, le=0.5, description="Share of the training groups that only measure; never the held-out part."
    )
    checkpoint_steps: int = Field(25, ge=1, le=100_000, description="Steps between two checkpoints.")
    sweep: int = Field(0, ge=0, le=MOST_TRIALS, description="Candidates tried against each other first; 0: none.")
    quantize: Literal["none", "nf4"] = Field("none", description="nf4 keeps the base in 4 bits while training (QLoRA).")
    devices: int = Field(1, ge=1, le=64, description="GPUs trained on at once, through accelerate.")

    @field_validator("sweep")
    @classmethod
    def _compares_something(cls, sweep: int) -> int:
        if sweep == 1:
            raise ValueError("a sweep tries at least 2 candidates; 0 tries none")
        return sweep

    @field_validator("replay_from")
    @classmethod
    def _leaves_the_measure(cls, replay_from: str) -> str:
        if replay_from == BASE_ABILITY:
            raise ValueError(NOT_TAUGHT)
        return replay_from


class SftParams(TrainParams):
    """Imitate the right answers. Defaults suit a few hundred corrections."""


class DpoParams(TrainParams):
    """Prefer the better of two answers, from corrections and preferences."""

    lr: float = Field(1e-3, gt=0, le=0.1, description="Highest learning rate; it rises, then falls as a cosine.")
    beta: float = Field(0.1, gt=0, le=10, description="How strongly it is held to the base; low lets it go further.")
    sft_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of imitating the answers that are better or right."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of the pairs believed to be the wrong way.")


class KtoParams(TrainParams):
    """Learn from single answers, each marked right or wrong."""

    lr: float = Field(1e-3, gt=0, le=0.1, description="Highest learning rate; it rises, then falls as a cosine.")
    batch_size: int = Field(8, ge=2, le=256, description="Examples a step and device; their mix estimates the drift.")
    beta: float = Field(0.1, gt=0, le=10, description="How strongly it is held to the base; low lets it go further.")
    sft_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of imitating the answers that are better or right."
    )
    good_weight: float = Field(1.0, gt=0, le=100, description="Weight of answers marked right.")
    bad_weight: float = Field(1.0, gt=0, le=100, description="Weight of answers marked wrong.")


class SpeculatorParams(BaseModel):
    """How heads are trained. Defaults are those of benchmarks/results/heads.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: int = Field(4, ge=1, le=16, description="Tokens drafted at most.")
    vocabulary: int = Field(1024, ge=16, le=131_072, description="Words that can be drafted, the most frequent ones.")
    conditioning: Literal["none", "hydra"] = Field("hydra", description="Whether heads are told the token before.")
    lr: float = Field(1e-2, gt=0, le=0.1, description="Highest learning rate.")
    epochs: float = Field(3.0, gt=0, le=100, description="How often every logged answer is seen.")
    max_tokens: int = Field(
        500_000,
        ge=1000,
        le=100_000_000,
        description="Tokens read, prompts included; a request counts for a 60th of them at most.",
    )
    min_requests: int = Field(60, ge=60, le=1_000_000, description="Logged requests it takes to begin.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Order of the answers and start of the heads.")


PARAMS: Mapping[str, type[BaseModel]] = {
    "sft": SftParams, "dpo": DpoParams, "kto": KtoParams, "speculator": SpeculatorParams,
}  # fmt: skip


def checked(kind: str, params: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> BaseModel:
    """Defaults, then the project's `train` config for this kind, then `params`.

    Raises InvalidRequest naming the parameter, or the kind.
    """
    if kind not in PARAMS:
        raise InvalidRequest(f"there are no runs of kind {kind!r}; kinds: {', '.join(KINDS)}", param="kind")
    return _checked(PARAMS[kind], {**configured(kind, config or {}), **params})


def adapter_params(kind: str, stored: Mapping[str, Any]) -> TrainParams:
    """A stored run's parameters again; those that a newer release added take their defaults."""
    made = PARAMS[kind].model_validate(stored)
    assert isinstance(made, TrainParams)
    return made


def configured(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a project's `train` config says for a kind: {"lr": …, "dpo": {"lr": …}}; the plain names are sft's."""
    stored = config.get("train") or {}
    if kind == "sft":
        return {name: value for name, value in stored.items() if name not in KINDS} | dict(stored.get("sft") or {})
    return dict(stored.get(kind) or {})


def check_config(train: Mapping[str, Any]) -> None:
    """A project's `train` config. Raises ValueError naming what is wrong with it."""
    for kind in KINDS:
        if not isinstance(train.get(kind, {}), Mapping):
            raise ValueError(f"{kind} holds parameters by name")  # noqa: TRY004 - pydantic wants a ValueError
        try:
            checked(kind, {}, {"train": train})
        except InvalidRequest as error:
            raise ValueError(error.message) from error


def errors_of(model: type[BaseModel], params: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each field of a form, by name; empty when nothing is."""
    try:
        model.model_validate(dict(params))
    except ValidationError as error:
        return {str(one["loc"][0]): one["msg"].removeprefix("Value error, ") for one in error.errors()}
    return {}


def _checked(kind: type[Params], chosen: Mapping[str, Any]) -> Params:
    try:
        return kind.model_validate(dict(chosen))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(kind.model_fields)
        hint = f" (known: {known})" if first["type"] == "extra_forbidden" else ""
        raise InvalidRequest(f"training parameter {name}: {first['msg']}{hint}", param=name) from error
