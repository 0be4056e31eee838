"""The gate: a pure function of two score tables. Promote only what is better where it should be and does no harm seen.

- Target slice: the lower bound of the paired, clustered interval must be above 0.
- Every other slice is guarded: its lower bound must be above minus its margin. A slice with too few rows to show that
  is weak and refuses on evidence of harm only; the decision says so, and how many more would settle it.
- Looks: see `looks`. All tests of one look are at that look's level: promoting takes all of them, so the chance of a
  wrong promotion is at most the largest of theirs (intersection-union test, Berger 1982), and nothing is divided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.store.evaluation_config import ALPHA, LEAST_GROUPS, TARGET
from worker.gate.looks import Budget, z_of
from worker.gate.saddlepoint import bounds
from worker.gate.statistics import Clusters, cluster, groups_needed

HARM_ALPHA = 0.05
PLANNED_EFFECT = 0.05  # the gain to plan labels for while none has been seen


class ScoredRow(NamedTuple):
    """One held-out example under both, scored by the deciding metric in [0, 1]."""

    slice: str
    group: str
    baseline: float
    candidate: float


class Table(NamedTuple):
    """The rows of one slice: scores in [0, 1] under both, and whatever names each row's group; equal lengths."""

    baseline: NDArray[np.float64]
    candidate: NDArray[np.float64]
    groups: NDArray[Any]


@dataclass(frozen=True)
class Policy:
    """What the gate asks for. Margins are differences of scores: 0.03 is three points; `margins` are slices' own.

    A slice of fewer than `guard_rows` rows or `guard_groups` groups is weak: with 15 % of the pairs differing, 1,000
    of them show a 3-point margin kept only seven times in ten when nothing is lost at all.
    """

    margin: float = 0.03
    margins: Mapping[str, float] = field(default_factory=dict)
    alpha: float = ALPHA
    min_groups: int = LEAST_GROUPS
    guard_rows: int = 1000
    guard_groups: int = 100

    def margin_of(self, name: str) -> float:
        return self.margins.get(name, self.margin)


@dataclass(frozen=True)
class SliceResult:
    """A slice's means, their difference (candidate - baseline) with its interval, and the rows behind it.

    `harmed` says that a weak slice shows a loss that chance explains poorly.
    """

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
    margin: float | None = None
    weak: bool = False
    harmed: bool = False


@dataclass(frozen=True)
class Decision:
    """`needed` is how many more held-out groups would let the gate see, `wanted` the same for each slice; None and
    empty when labels are not what is missing. `tested` is False when nothing was compared and no look is spent."""

    promote: bool
    reasons: list[str]
    slices: dict[str, SliceResult]
    look: int
    alpha: float
    needed: int | None = None
    wanted: dict[str, int] = field(default_factory=dict)
    tested: bool = True

    @property
    def carry(self) -> float:
        """What a promotion hands on to the next look."""
        return self.alpha if self.promote else 0.0

    def summary(self) -> dict[str, Any]:
        """For the evaluation's row and page."""
        return {
            "slices": {name: asdict(result) for name, result in self.slices.items()},
            "look": self.look,
            "alpha": self.alpha,
            "needed": self.needed,
            "wanted": self.wanted,
            "tested": self.tested,
        }


@dataclass
class _Findings:
    """Sentences for and against, gathered slice by slice, and the groups each slice lacks."""

    next_z: float
    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    wanted: dict[str, int] = field(default_factory=dict)


def decide(
    rows: Sequence[ScoredRow] | Mapping[str, Table],
    *,
    look: int,
    carried: float = 0.0,
    policy: Policy | None = None,
) -> Decision:
    """Judge the `look`-th (from 1) comparison on this held-out part; `carried` is what a promotion handed on to it."""
    chosen = policy or Policy()
    tables = rows if isinstance(rows, Mapping) else tabulate(rows)
    alpha = Budget(chosen.alpha).level(look, carried)
    slices = {name: measure(table, alpha, chosen, name) for name, table in sorted(tables.items())}
    findings = _Findings(next_z=z_of(Budget(chosen.alpha).level(look + 1)))
    tested = _judge_target(slices.get(TARGET), chosen, findings)
    for name, result in slices.items():
        if name != TARGET:
            _judge_guard(name, result, chosen, findings)
    return Decision(
        promote=not findings.bad,
        reasons=[*findings.bad, *findings.good],
        slices=slices,
        look=look,
        alpha=alpha,
        needed=max(findings.wanted.values(), default=None),
        wanted=findings.wanted,
        tested=tested,
    )


def tabulate(rows: Sequence[ScoredRow]) -> dict[str, Table]:
    """The rows slice by slice."""
    gathered: dict[str, list[ScoredRow]] = {}
    for row in rows:
        gathered.setdefault(row.slice, []).append(row)
    return {
        name: Table(
            np.array([row.baseline for row in found], dtype=float),
            np.array([row.candidate for row in found], dtype=float),
            np.array([row.group for row in found]),
        )
        for name, found in gathered.items()
    }


def measure(table: Table, alpha: float, policy: Policy, name: str) -> SliceResult:
    """A slice with the bounds of its difference at level `alpha` each."""
    differences = table.candidate - table.baseline
    clusters = cluster(differences, table.groups)
    interval = bounds(clusters, alpha)
    rows, groups = len(differences), len(clusters.sums)
    margin = None if name == TARGET else policy.margin_of(name)
    weak = margin is not None and (rows < policy.guard_rows or groups < policy.guard_groups)
    return SliceResult(
        rows=rows,
        groups=groups,
        baseline=float(table.baseline.mean()),
        candidate=float(table.candidate.mean()),
        delta=clusters.mean,
        low=interval.low,
        high=interval.high,
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
        spread=clusters.spread,
        margin=margin,
        weak=weak,
        harmed=weak and margin is not None and interval.low <= -margin and _harmed(clusters, margin),
    )


def _harmed(clusters: Clusters, margin: float) -> bool:
    """Whether chance is a poor explanation of a loss on a weak slice. Its level is its own: a guard that only warns
    of what it sees costs no wrong promotion, and it must not go blind as looks are spent."""
    return clusters.mean < -margin and bounds(clusters, HARM_ALPHA).high < 0


def _judge_target(result: SliceResult | None, policy: Policy, findings: _Findings) -> bool:
    """Whether there was enough to test."""
    groups = result.groups if result else 0
    if result is None or groups < policy.min_groups:
        missing = policy.min_groups - groups
        findings.bad.append(f"too few held-out corrections to judge by: {groups} groups, needs {missing} more")
        findings.wanted[TARGET] = missing
        return False
    if result.low > 0:
        findings.good.append(f"better on what was corrected: {_interval(result)} over {result.rows:,} rows")
        return True
    findings.bad.append(f"not shown to be better on what was corrected: {_interval(result)}")
    effect = result.delta if result.delta > 0 else PLANNED_EFFECT
    wanted = groups_needed(max(result.spread, PLANNED_EFFECT), effect, findings.next_z)
    if wanted is not None:
        findings.wanted[TARGET] = max(1, wanted - groups)
    return True


def _judge_guard(name: str, result: SliceResult, policy: Policy, findings: _Findings) -> None:
    margin = policy.margin_of(name)
    points = f"{100 * margin:g} points"
    if result.low > -margin:
        findings.good.append(f"no worse on {name} by more than {points}: {_interval(result)}")
    elif not result.weak:
        findings.bad.append(f"may be worse on {name} by more than {points}: {_interval(result)}")
        missing = _missing(result, margin + min(result.delta, 0.0), findings.next_z)
        if missing is not None:
            findings.wanted[name] = missing
    elif result.harmed:
        findings.bad.append(f"worse on {name}: {_interval(result)} over {result.rows:,} rows")
    else:
        missing = _missing(result, margin, findings.next_z)
        more = None if missing is None else max(missing, _until_strong(result, policy))
        needs = "and no number of them would" if more is None else f"needs about {more:,} more"
        findings.good.append(
            f"no harm seen on {name}: {_interval(result)}; {result.groups:,} groups cannot rule {points} out, {needs}"
        )


def _missing(result: SliceResult, room: float, z: float) -> int | None:
    """Groups that a slice lacks to show that it keeps its margin; None where there is no room to show it in."""
    wanted = groups_needed(max(result.spread, room), room, z)
    return None if wanted is None else max(1, wanted - result.groups)


def _until_strong(result: SliceResult, policy: Policy) -> int:
    """Groups of the size of these until neither they nor their rows are too few."""
    rows_short = (policy.guard_rows - result.rows) * result.groups / result.rows
    return max(policy.guard_groups - result.groups, ceil(rows_short))


def _interval(result: SliceResult) -> str:
    figures = f"{100 * result.delta:+.1f} points [{100 * result.low:+.1f}, {100 * result.high:+.1f}]"
    return figures.replace("-", "−")
