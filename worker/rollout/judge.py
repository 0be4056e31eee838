"""What the figures say of a candidate on trial: promote it, roll it back, hold, wait; and in words why.

A pure function of sums over users, so that it may be asked after every outcome and costs the same each time. A trial
is wrongly rolled back at most once in twenty: half of that is spent on the signal, the guardrails share 1.5 points.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from services.store.rollout_config import NEEDS, SHARES, RolloutConfig
from services.store.rollout_counts import SIGNAL, Arms
from worker.rollout import ratio
from worker.rollout.ratio import Ratio
from worker.rollout.sequence import Interval, difference

# Two-sided: the interval that is drawn. Either end is left with half of it at most.
ALPHA = 0.05
GUARDS_ALPHA = 0.03
GUARD_USERS = 5
# Where not one request of the candidate was answered, exact figures are sooner certain: the chance that so many users
# only met the control's errors, and five points more.
DEAD, DEAD_MARGIN = 0.0005, 0.05
Action = Literal["wait", "hold", "promote", "roll_back"]
GuardState = Literal["few", "fine", "worse", "tripped"]


class Rail(NamedTuple):
    """How a guardrail is read: which side is bad (0: both) and whether its outcomes are shares."""

    words: str
    bad: Literal[-1, 0, 1]
    share: bool


RAILS: Mapping[str, Rail] = {
    "errors": Rail("requests that end in an error", 1, True),
    "latency": Rail("answers slower than p95 before", 1, True),
    "ttft": Rail("first tokens later than p95 before", 1, True),
    "length": Rail("length of the answers", 0, False),
    "refusals": Rail("answers that refuse", 1, True),
    "acceptance": Rail("drafted tokens that are accepted", -1, True),
}


class Evidence(NamedTuple):
    """Sums by metric; `requests` and `users` are (candidate, control) of all that was routed, `share` the split."""

    metrics: Mapping[str, Arms]
    requests: tuple[int, int]
    users: tuple[int, int]
    share: float


class Guard(NamedTuple):
    """One guardrail now; `tolerance` in the unit of the interval."""

    name: str
    state: GuardState
    tolerance: float
    interval: Interval | None


class Verdict(NamedTuple):
    """What to do and why; `more` is how many more requests of both arms are likely needed, if nothing changes."""

    action: Action
    reason: str
    signal: Interval | None
    guards: tuple[Guard, ...]
    ratio: Ratio
    more: int | None = None

    def document(self) -> dict[str, Any]:
        """As the database keeps it."""
        return {
            "action": self.action, "reason": self.reason, "more": self.more,
            "signal": self.signal._asdict() if self.signal else None,
            "guards": [
                {
                    **guard._asdict(), "interval": guard.interval._asdict() if guard.interval else None,
                    "words": RAILS[guard.name].words, "share": RAILS[guard.name].share,
                }
                for guard in self.guards
            ],
            "ratio": {**self.ratio._asdict(), "off": self.ratio.off},
        }  # fmt: skip


def judge(evidence: Evidence, config: RolloutConfig, *, in_full: bool = True, held: str | None = None) -> Verdict:
    """What the figures so far say. May be asked as often as one likes: every bound holds at all times at once.

    `held`: why an earlier look held it. That stands, as what came while the split was off is still among the counts.
    Not `in_full`: guardrails that are fine by their means alone come without an interval. The judgement is the same.
    """
    guards = _guards(evidence, config, in_full=in_full)
    split = ratio.check(*evidence.users, evidence.share)
    arms = evidence.metrics.get(SIGNAL)
    signal = difference(arms, ALPHA, share=config.signal in SHARES) if arms else None
    tripped = [guard for guard in guards if guard.state == "tripped"]
    if tripped:
        return Verdict("roll_back", f"guardrail: {' and '.join(map(_told, tripped))}", signal, guards, split)
    if split.off or held:
        return Verdict("hold", _told_split(split) if split.off else str(held), signal, guards, split)
    lacking = _lacking(arms, config)
    if signal is None or lacking:
        return Verdict("wait", lacking or "not enough users yet", signal, guards, split)
    return _decide(signal, guards, split, evidence, config)


def _decide(
    signal: Interval, guards: tuple[Guard, ...], split: Ratio, evidence: Evidence, config: RolloutConfig
) -> Verdict:
    told = told_interval(signal, config)
    arms = evidence.metrics[SIGNAL]
    counted = f"on {arms.canary.n:,} outcomes of {arms.canary.users:,} users against {arms.control.n:,}"
    if signal.high < 0:
        return Verdict("roll_back", f"worse than what serves: {told} {counted}", signal, guards, split)
    bar = config.benefit if config.benefit is not None else -config.harm
    if signal.low > bar:
        worse = [guard for guard in guards if guard.state == "worse"]
        if worse:
            reason = f"the signal is fine ({told}), but {' and '.join(map(_told, worse))}, which is not certain yet"
            return Verdict("wait", reason, signal, guards, split)
        how = f"better by {_amount(bar, config)}" if bar >= 0 else f"no worse by {_amount(-bar, config)}"
        return Verdict("promote", f"{how} or more: {told} {counted}", signal, guards, split)
    more = _more(signal, bar, evidence)
    return Verdict("wait", f"not decided: {told} {counted}", signal, guards, split, more)


def _lacking(arms: Arms | None, config: RolloutConfig) -> str | None:
    """What the first decision waits for, in words."""
    if arms is None or not arms.canary.n:
        return f"no outcome of the candidate yet: {NEEDS[config.signal]}"
    for arm, who in zip(arms, ("the candidate", "what serves"), strict=True):
        if arm.users < config.least_users:
            return f"outcomes of {arm.users} of the {config.least_users} users it takes of {who}"
        if arm.n < config.least_requests:
            return f"{arm.n} of the {config.least_requests} outcomes it takes of {who}"
    return None


def _more(signal: Interval, bar: float, evidence: Evidence) -> int | None:
    """The interval narrows with the root of the count: how many more until it leaves the nearer of its two gates."""
    room = [signal.estimate - bar] if signal.estimate > bar else []
    room += [-signal.estimate] if signal.estimate < 0 else []
    if not room:
        return None
    times = ((signal.estimate - signal.low) / max(room)) ** 2
    return max(1, math.ceil(sum(evidence.requests) * (times - 1)))


# --- guardrails --------------------------------------------------------------------------------------------


def _guards(evidence: Evidence, config: RolloutConfig, *, in_full: bool) -> tuple[Guard, ...]:
    wanted = {name: limit for name in RAILS if (limit := getattr(config.guardrails, name)) is not None}
    alpha = GUARDS_ALPHA / max(1, len(wanted))
    return tuple(
        _guard(name, limit, evidence.metrics.get(name), alpha, in_full=in_full) for name, limit in wanted.items()
    )


def _guard(name: str, limit: float, arms: Arms | None, alpha: float, *, in_full: bool) -> Guard:
    rail = RAILS[name]
    tolerance = math.log(limit) if rail.bad == 0 else limit
    if name == "errors" and arms is not None and _is_dead(arms):
        return Guard(name, "tripped", tolerance, Interval(1 - arms.control.y / arms.control.w, 0.0, 1.0, 0.0))
    if arms is None or min(arms.canary.users, arms.control.users) < GUARD_USERS:
        return Guard(name, "few", tolerance, None)
    if not in_full and _worst(rail, arms.canary.y / arms.canary.w - arms.control.y / arms.control.w) <= tolerance:
        return Guard(name, "fine", tolerance, None)
    found = difference(arms, alpha, share=rail.share)
    if found is None:
        return Guard(name, "few", tolerance, None)
    least = {1: found.low, -1: -found.high, 0: max(found.low, -found.high)}[rail.bad]
    worse = _worst(rail, found.estimate) > tolerance
    state: GuardState = "tripped" if least > tolerance else "worse" if worse else "fine"
    return Guard(name, state, tolerance, found)


def _worst(rail: Rail, difference: float) -> float:
    """A difference in the direction that is bad."""
    return abs(difference) if rail.bad == 0 else rail.bad * difference


def _is_dead(arms: Arms) -> bool:
    """Whether the candidate has answered nobody at all while the other arm answers."""
    canary, control = arms
    if not canary.users or not control.w or canary.y < canary.w:
        return False
    return min(1.0, control.y / control.w + DEAD_MARGIN) ** canary.users <= DEAD


# --- words -------------------------------------------------------------------------------------------------


def told_interval(found: Interval, config: RolloutConfig) -> str:
    """A difference as people read it."""
    if config.signal in SHARES:
        return f"{_points(found.estimate)} points [{_points(found.low)}, {_points(found.high)}]"
    return f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]".replace("-", "−")


def _amount(value: float, config: RolloutConfig) -> str:
    return f"{100 * value:g} points" if config.signal in SHARES else f"{value:g}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _told(guard: Guard) -> str:
    rail, found = RAILS[guard.name], guard.interval
    assert found is not None, "only a measured guardrail is told"
    if not rail.share:
        return f"{rail.words} {math.exp(found.estimate):.2f} times the control's"
    return f"{rail.words} {_points(found.estimate)} points (tolerated: {100 * guard.tolerance:g})"


def _told_split(split: Ratio) -> str:
    return (
        f"the split is not what it should be: {split.canary:,} of {split.canary + split.control:,} users came to the "
        f"candidate, {100 * (split.seen or 0):.1f} % where {100 * split.share:.0f} % were to; nothing is decided by it"
    )
