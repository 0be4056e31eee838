"""What a project allows of immediate effect: pinned answers and worked examples. Both are off unless it says so."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class PinConfig(BaseModel):
    """A project's `config["pinned_answers"]`; absent keys take these defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(False, description="Serve approved answers to identical requests.")
    seeded: bool = Field(False, description="Serve them to sampled requests that name a seed of their own, too.")
    most: int = Field(1000, ge=1, le=10_000, description="Answers that may be pinned at once.")
    most_bytes: int = Field(4_000_000, ge=1000, le=64_000_000, description="Bytes of their texts, prompts included.")


class WorkedConfig(BaseModel):
    """A project's `config["worked_examples"]`; absent keys take these defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(False, description="Place the nearest corrections in the prompt.")
    most: int = Field(2, ge=1, le=8, description="Corrections placed in one prompt.")
    tokens: int = Field(512, ge=16, le=32_768, description="Tokens they may take of the prompt.")
    similarity: float = Field(0.5, ge=-1, le=1, description="Least cosine between the two questions.")
    deadline_ms: int = Field(50, ge=1, le=5000, description="Wait for the question's vector; then none is placed.")


Config = TypeVar("Config", bound=BaseModel)


def read_pins(config: Mapping[str, Any]) -> PinConfig:
    """What the project says of pinned answers."""
    return _read(PinConfig, config.get("pinned_answers"))


def read_worked(config: Mapping[str, Any]) -> WorkedConfig:
    """What the project says of worked examples."""
    return _read(WorkedConfig, config.get("worked_examples"))


def _read(kind: type[Config], stored: object) -> Config:
    """As far as it is known: values are checked when they are stored, and nonsense must not stop anybody serving."""
    fields = stored if isinstance(stored, dict) else {}
    try:
        return kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
    except ValidationError:
        return kind()
