"""The gate: a pure function of two score tables. Promote only what is better where it should be and no worse elsewhere.

- Target slice: the lower bound of the paired interval must be above 0.
- Every other slice is guarded: its lower bound must be above minus the margin. A slice with too few groups to show
  that is refused only on evidence of harm, and the decision says how many more would settle it.
- Looks: look k on the same held-out part may spend alpha/(k(k+1)), which sums to alpha however often gates look.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

from worker.gate.statistics import bootstrap, cluster, groups_needed

TARGET = "target"
HARM_ALPHA = 0.1
PLANNED_EFFECT = 0.05  # the gain to plan labels for while none has been seen


class ScoredRow(NamedTuple):
    """One held-out example under both, scored by the deciding metric in [0, 1]."""

    slice: str
    group: str
    baseline: float
    candidate: float


@dataclass(frozen=True)
class Policy:
    """What the gate asks for. `margin` is a difference of scores: 0.03 is three points."""

    margin: float = 0.03
    alpha: float = 0.05
    min_groups: int = 30
    guard_groups: int = 100
    seed: int = 0


@dataclass(frozen=True)
class SliceResult:
    """A slice's means, their difference (candidate - baseline) with its interval, and the rows behind it."""

    rows: int
    groups: int
    baseline: float
    candidate: float
    delta: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    spread: float


@dataclass(frozen=True)
class Decision:
    """`needed` is how many more held-out groups would let the gate see; None when labels are not what is missing."""

    promote: bool
    reasons: list[str]
    slices: dict[str, SliceResult]
    look: int
    alpha: float
    needed: int | None = None

    def summary(self) -> dict[str, Any]:
        """For the evaluation's row and page."""
        return {
            "slices": {name: asdict(result) for name, result in self.slices.items()},
            "look": self.look,
            "alpha": self.alpha,
            "needed": self.needed,
        }


@dataclass
class _Findings:
    """Sentences for and against, gathered slice by slice."""

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    needed: list[int] = field(default_factory=list)


def decide(rows: Sequence[ScoredRow], *, look: int, policy: Policy | None = None) -> Decision:
    """Judge the `look`-th (from 1) comparison on this held-out part."""
    chosen = policy or Policy()
    alpha = spend(chosen.alpha, look)
    names = sorted({row.slice for row in rows})
    slices = {name: measure([row for row in rows if row.slice == name], alpha, chosen.seed) for name in names}
    findings = _Findings()
    _judge_target(slices.get(TARGET), chosen, alpha, findings)
    for name, result in slices.items():
        if name != TARGET:
            _judge_guard(name, [row for row in rows if row.slice == name], result, chosen, alpha, findings)
    return Decision(
        promote=not findings.bad,
        reasons=[*findings.bad, *findings.good],
        slices=slices,
        look=look,
        alpha=alpha,
        needed=max(findings.needed, default=None),
    )


def spend(alpha: float, look: int) -> float:
    """The level of the `look`-th look; over all looks it sums to `alpha`."""
    if look < 1:
        raise ValueError("looks are counted from 1")
    return alpha / (look * (look + 1))


def measure(rows: Sequence[ScoredRow], alpha: float, seed: int) -> SliceResult:
    differences = [row.candidate - row.baseline for row in rows]
    clusters = cluster(differences, [row.group for row in rows])
    interval = bootstrap(clusters, alpha, seed=seed)
    return SliceResult(
        rows=len(rows),
        groups=len(clusters.sums),
        baseline=sum(row.baseline for row in rows) / len(rows),
        candidate=sum(row.candidate for row in rows) / len(rows),
        delta=clusters.mean,
        low=interval.low,
        high=interval.high,
        wins=sum(difference > 0 for difference in differences),
        ties=sum(difference == 0 for difference in differences),
        losses=sum(difference < 0 for difference in differences),
        spread=clusters.spread,
    )


def _judge_target(result: SliceResult | None, policy: Policy, alpha: float, findings: _Findings) -> None:
    groups = result.groups if result else 0
    if result is None or groups < policy.min_groups:
        missing = policy.min_groups - groups
        findings.bad.append(f"too few held-out corrections to judge by: {groups} groups, needs {missing} more")
        findings.needed.append(missing)
    elif result.low > 0:
        findings.good.append(f"better on what was corrected: {_interval(result)} over {result.rows} rows")
    else:
        findings.bad.append(f"not shown to be better on what was corrected: {_interval(result)}")
        effect = result.delta if result.delta > 0 else PLANNED_EFFECT
        wanted = groups_needed(max(result.spread, PLANNED_EFFECT), effect, _z(alpha))
        findings.needed.append(max(1, wanted - groups))


def _judge_guard(
    name: str, rows: Sequence[ScoredRow], result: SliceResult, policy: Policy, alpha: float, findings: _Findings
) -> None:
    points = f"{100 * policy.margin:g} points"
    if result.groups >= policy.guard_groups:
        if result.low > -policy.margin:
            findings.good.append(f"no worse on {name} by more than {points}: {_interval(result)}")
        else:
            findings.bad.append(f"may be worse on {name} by more than {points}: {_interval(result)}")
        return
    wanted = max(policy.guard_groups, groups_needed(max(result.spread, policy.margin), policy.margin, _z(alpha)))
    if measure(rows, HARM_ALPHA, policy.seed).high < -policy.margin:
        findings.bad.append(f"worse on {name}: {_interval(result)}")
    else:
        findings.good.append(
            f"no harm seen on {name}: {_interval(result)}; {result.groups} groups cannot rule {points} out, "
            f"needs about {wanted - result.groups} more"
        )


def _interval(result: SliceResult) -> str:
    return f"{100 * result.delta:+.1f} points [{100 * result.low:+.1f}, {100 * result.high:+.1f}]"


def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha)
