"""When a project's adapter is trained without anybody asking: so many new examples, a schedule, drift."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from services.store.run_params import AdapterKind

CLOCK = re.compile(r"([01]\d|2[0-3]):[0-5]\d")


class TrainWhen(BaseModel):
    """A project's `config["train_when"]`; every trigger is off until it is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: AdapterKind = Field("sft", description="What is trained: sft, dpo or kto.")
    examples: int = Field(
        0, ge=0, le=1_000_000, description="Answers reviewed or imported since the last run began; 0: never."
    )
    every_hours: float = Field(0, ge=0, le=8760, description="Hours since the last run began; 0: never.")
    daily_at: str = Field(
        "", description="Once a day at this time, HH:MM in UTC, for what was there by then; empty: never."
    )
    drift_points: float = Field(
        0, ge=0, le=100, description="On drift: other things are asked, or quality fell by so many points; 0: never."
    )
    min_minutes: float = Field(60, ge=0, le=525_600, description="Least time between the starts of two runs.")

    @field_validator("daily_at")
    @classmethod
    def _is_a_time(cls, clock: str) -> str:
        if clock and not CLOCK.fullmatch(clock):
            raise ValueError("a time is HH:MM, from 00:00 to 23:59")
        return clock

    @property
    def wanted(self) -> bool:
        """Whether anything is set at all."""
        return bool(self.examples or self.every_hours or self.daily_at or self.drift_points)


def read_config(config: Mapping[str, Any]) -> TrainWhen:
    """The triggers in a project's configuration; nonsense that got there another way triggers nothing."""
    try:
        return TrainWhen.model_validate(config.get("train_when") or {})
    except ValidationError:
        return TrainWhen()


def last_due(when: TrainWhen, now: datetime) -> datetime | None:
    """The daily time that has passed last; None when there is none."""
    if not when.daily_at:
        return None
    hour, minute = map(int, when.daily_at.split(":"))
    today = now.astimezone(UTC).replace(hour=hour, minute=minute, second=0, microsecond=0)
    return today if today <= now else today - timedelta(days=1)
