"""How a project samples what it serves: the windows, the budget, and the shares of the strategies.

The configuration's one reader: the worker plans by it and the queue page shows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNIFORM = "uniform"
# What people put in the queue themselves: a stratum of its own, as nothing drew it.
CHOSEN = "chosen"
# The first that claims an interaction has it; what nobody claims is the audit's.
PRECEDENCE = ("negative_feedback", "schema_failure", "disagreement", "low_confidence", "novelty", UNIFORM)
LEAST_AUDIT = 0.2
DEFAULT_MIX: Mapping[str, float] = {
    "negative_feedback": 0.3, "schema_failure": 0.1, "disagreement": 0.1, "low_confidence": 0.15, "novelty": 0.1,
    UNIFORM: 0.25,
}  # fmt: skip
LONGEST_GRACE_SECONDS = 60
STAMP = "%Y-%m-%dT%H:%M:%SZ"  # of window labels: their order as text is their order in time


@dataclass(frozen=True)
class Plan:
    """A project's sampling configuration. Raises ValueError for values that make no sense.

    `mix` are the strategies' shares of the budget; they add up to 1. `second_share` is None where nobody chose.
    """

    window_seconds: int
    grace_seconds: int
    budget: int
    mix: Mapping[str, float]
    held_out_share: float
    second_share: float | None
    response_schema: dict[str, Any] | None

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Plan":
        window = int(config.get("window_seconds", 3600))
        second = config.get("second_share")
        plan = cls(
            window_seconds=window,
            grace_seconds=int(config.get("window_grace_seconds", min(window, LONGEST_GRACE_SECONDS))),
            budget=int(config.get("review_budget", 200)),
            mix=mix_of(config),
            held_out_share=float(config.get("held_out_share", 0.2)),
            second_share=None if second is None else float(second),
            response_schema=config.get("response_schema"),
        )
        if plan.window_seconds < 1 or plan.grace_seconds < 0 or plan.budget < 1:
            raise ValueError("window_seconds and review_budget must be at least 1, window_grace_seconds 0")
        if not 0 <= plan.held_out_share < 1:
            raise ValueError("held_out_share must be in [0, 1)")
        return plan


def mix_of(config: dict[str, Any]) -> Mapping[str, float]:
    """The shares in order of precedence: as configured, or the default beside the configured `uniform_share`."""
    chosen = config.get("strategy_mix")
    if chosen is not None:
        check_mix(chosen)
        return {name: float(chosen.get(name, 0.0)) for name in PRECEDENCE}
    audit = float(config.get("uniform_share", DEFAULT_MIX[UNIFORM]))
    if audit > 1:
        raise ValueError("uniform_share must be at most 1")
    audit = max(LEAST_AUDIT, audit)
    others = (1 - audit) / (1 - DEFAULT_MIX[UNIFORM])
    return {name: audit if name == UNIFORM else DEFAULT_MIX[name] * others for name in PRECEDENCE}


def check_mix(mix: Mapping[str, float]) -> None:
    """Raise ValueError with what is wrong: a name, a share, the sum, or an audit below its lock."""
    unknown = sorted(set(mix) - set(PRECEDENCE))
    if unknown:
        raise ValueError(f"unknown strategy {unknown[0]!r}: choose from {', '.join(PRECEDENCE)}")
    if not all(0 <= share <= 1 for share in mix.values()):
        raise ValueError("every share must be between 0 and 1")
    if mix.get(UNIFORM, 0.0) < LEAST_AUDIT:
        raise ValueError(
            f"the uniform audit takes at least {LEAST_AUDIT:.0%} of the labels: without it nobody knows how good "
            "the rest of the traffic is"
        )
    if abs(sum(mix.values()) - 1) > 1e-3:
        raise ValueError(f"the shares must add up to 100 %, not {100 * sum(mix.values()):g} %")
