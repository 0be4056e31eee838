"""How a project speculates: what may be configured, and which arm of the comparison a request belongs to.

Gateways choose the arm, the dispatcher recomputes it from the interaction's id: the log needs no column for it, and
what a request happened to draft with cannot bias the comparison.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Arm = Literal["baseline", "suffix", "canary", "live"]


class SpeculationConfig(BaseModel):
    """A project's `config["speculation"]`; absent keys take these defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="False: nothing is drafted for this project, and no heads are trained.")
    automatic: bool = Field(True, description="Train, promote and roll back heads without being asked.")
    baseline_share: float = Field(0.02, ge=0, le=0.5, description="Requests served without drafting, to measure by.")
    control_share: float = Field(0.05, ge=0, le=0.5, description="Requests served without heads while heads are live.")
    first_tokens: int = Field(50_000, ge=1, description="Live response tokens before the first heads are trained.")
    growth: float = Field(1.5, gt=1, le=100, description="Train again when the response tokens grew by this factor.")
    min_minutes: float = Field(15, ge=0, le=525_600, description="Least time between the starts of two trainings.")
    canary_share: float = Field(0.25, ge=0, le=0.9, description="Requests new heads are tried on; 0: live at once.")
    canary_requests: int = Field(60, ge=5, le=100_000, description="Requests of each arm before the first decision.")
    canary_hours: float = Field(24, gt=0, le=8760, description="Undecided for so long, new heads are withdrawn.")


class Heads(NamedTuple):
    """What a deployment says of its speculators: digests, and the share of requests that try the canary."""

    live: str | None = None
    canary: str | None = None
    share: float = 0.0

    def of(self, arm: Arm) -> str | None:
        """The heads that a request of this arm asks for; None leaves the suffix drafter alone at work."""
        return {"live": self.live, "canary": self.canary}.get(arm)


def read_config(config: Mapping[str, Any]) -> SpeculationConfig:
    """The settings in a project's configuration. What was stored by another release is read as far as it is known.

    Values are checked when they are stored; nonsense that got there another way must not stop anybody from serving.
    """
    stored = config.get("speculation")
    stored = stored if isinstance(stored, dict) else {}
    known = {name: value for name, value in stored.items() if name in SpeculationConfig.model_fields}
    try:
        return SpeculationConfig.model_validate(known)
    except ValidationError:
        return SpeculationConfig()


def arm_of(request: UUID, config: SpeculationConfig, heads: Heads) -> Arm:
    """Where a request belongs, by its interaction's id alone; each draw is independent of the others."""
    if not config.enabled or _draw("baseline", request) < config.baseline_share:
        return "baseline"
    if heads.canary is not None and _draw(heads.canary, request) < heads.share:
        return "canary"
    if heads.live is None or _draw(heads.live, request) < config.control_share:
        return "suffix"
    return "live"


def _draw(salt: str, request: UUID) -> float:
    """Uniform in [0, 1), fixed by both."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{request.hex}".encode()).digest()[:8]) / 2**64
