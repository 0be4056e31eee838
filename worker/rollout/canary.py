"""What the figures say of heads: promote them, withdraw them, take them back, wait; drift and dead acceptance.

Pure functions of requests; `worker.rollout.watch` reads the requests and carries the verdicts out.
"""

from collections.abc import Sequence
from datetime import timedelta
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from services.store.speculation import SpeculationConfig
from services.store.speculation_log import Counts, Request
from worker.rollout.comparison import Comparison, compare

# A canary is looked at after so many times its `canary_requests`, and never in between: data seen as it comes would
# sooner or later show anything. Four looks share the error of 5 %: 2.5 standard errors each.
LOOKS = (1, 2, 4, 8)
CANARY_Z = 2.5
# As fast as the incumbent, give or take: a longer accepted length is proved, and the rate is the noisier figure.
RATE_MARGIN = 0.05
# Live heads are looked at all the time, so only what cannot be chance takes them back.
WATCH_Z = 4.0
FEWEST_CONTROLS = 30
# Without a control arm the requests from before are the measure, and load may have changed what is drafted since.
BEFORE_MARGIN = 0.1
DEAD_DRAFTS = {"heads": 200, "suffix": 1000}
# CUSUM over means of ten requests, in their standard deviations. Simulated, mean and deviation estimated from the
# reference: a false alarm in 2 million requests, a loss of two deviations found within 90 requests, of one within 320.
BLOCK = 10
REFERENCE_BLOCKS = 30
SLACK = 0.75
THRESHOLD = 10.0
LEAST_DEVIATION = 0.02

Action = Literal["wait", "promote", "roll_back", "withdraw"]


class Verdict(NamedTuple):
    """What to do, why, and the figures it comes from."""

    action: Action
    reason: str
    evidence: dict[str, Any]


class Arms(NamedTuple):
    """Requests of one stretch of time by arm, oldest first; `incumbent` is what drafts without the canary."""

    candidate: Sequence[Request]
    incumbent: Sequence[Request]


def judge_canary(arms: Arms, waited: timedelta, config: SpeculationConfig) -> Verdict:
    """Promote when more tokens are accepted a step and the rate is not worse; roll back when either is below."""
    due = [look for look in LOOKS if look * config.canary_requests <= len(arms.candidate)]
    if due:
        comparison = compare(*_until(arms, due[-1] * config.canary_requests), z=CANARY_Z)
        if verdict := _decided(comparison, last=due[-1] == LOOKS[-1]):
            return verdict
    if waited > timedelta(hours=config.canary_hours):
        evidence = compare(*arms, z=CANARY_Z).evidence()
        return Verdict("withdraw", f"undecided after {config.canary_hours:g} hours", evidence)
    return Verdict("wait", "not enough requests yet", {})


def _until(arms: Arms, count: int) -> Arms:
    """The first `count` candidates, and the incumbent's requests of that time."""
    candidates = arms.candidate[:count]
    return Arms(candidates, [one for one in arms.incumbent if one.at <= candidates[-1].at])


def _decided(comparison: Comparison, *, last: bool) -> Verdict | None:
    length, rate = comparison.length, comparison.rate
    evidence = comparison.evidence()
    if length.high < 1:
        return Verdict("roll_back", "fewer tokens accepted a step than by the incumbent", evidence)
    if rate.high < 1:
        return Verdict("roll_back", "fewer tokens a second than with the incumbent", evidence)
    if length.low > 1 and rate.low > 1 - RATE_MARGIN:
        return Verdict("promote", "more tokens accepted a step than by the incumbent, and not slower", evidence)
    return Verdict("withdraw", "no better than the incumbent on all its requests", evidence) if last else None


def judge_live(arms: Arms, before: Sequence[Request], config: SpeculationConfig) -> Verdict:
    """Roll back when requests with heads fare worse than those of the same time without, the control arm.

    Where that arm is too small, than the incumbent's `before` the promotion: by accepted length alone, because the
    rate of another hour is the load of another hour.
    """
    if len(arms.candidate) < config.canary_requests:
        return Verdict("wait", "not enough requests yet", {})
    if len(arms.incumbent) >= FEWEST_CONTROLS:
        comparison = compare(*arms, z=WATCH_Z)
        if comparison.length.high < 1:
            return Verdict("roll_back", "fewer tokens accepted a step than without heads", comparison.evidence())
        if comparison.rate.high < 1:
            return Verdict("roll_back", "fewer tokens a second than without heads", comparison.evidence())
    elif len(before) >= FEWEST_CONTROLS:
        comparison = compare(arms.candidate, before, z=WATCH_Z)
        if comparison.length.high < 1 - BEFORE_MARGIN:
            return Verdict("roll_back", "fewer tokens accepted a step than before", comparison.evidence())
    return Verdict("wait", "no worse", {})


def is_dead(requests: Sequence[Request], drafter: Literal["heads", "suffix"]) -> bool:
    """Whether of many drafts, the newest ones, not a single token came out: a fault somewhere, not bad luck."""
    drafts = 0
    for request in reversed(requests):
        counts: Counts = getattr(request, drafter)
        if counts.accepted:
            return False
        drafts += counts.drafts
        if drafts >= DEAD_DRAFTS[drafter]:
            return True
    return False


def has_drifted(requests: Sequence[Request]) -> bool:
    """Whether heads' first drafted tokens are accepted less often, for good, than in their first requests (Page's
    CUSUM). Accepted tokens a draft would sink with its length, which the engine chooses by its load."""
    shares = [one.heads.first / one.heads.drafts for one in requests if one.heads.drafts]
    blocks = [fmean(shares[start : start + BLOCK]) for start in range(0, len(shares) - BLOCK + 1, BLOCK)]
    reference, later = blocks[:REFERENCE_BLOCKS], blocks[REFERENCE_BLOCKS:]
    if not later:
        return False
    mean, deviation = fmean(reference), max(stdev(reference), LEAST_DEVIATION)
    total = 0.0
    for block in later:
        total = max(0.0, total + (mean - block) / deviation - SLACK)
        if total > THRESHOLD:
            return True
    return False
