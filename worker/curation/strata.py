"""The sampling plan of one closed window, as pure functions: strata, quotas, the order of labelling.

Every interaction belongs to exactly one stratum. Inside a stratum the order is a hash, so whatever part of it has
been labelled is a random sample of it, and labelled / size is its inclusion probability as realised.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from uuid import UUID

PRECEDENCE = ("negative_feedback", "uniform")
UNIFORM = "uniform"
LEAST_SHARE = 0.01
STAMP = "%Y-%m-%dT%H:%M:%SZ"  # of window labels: their order as text is their order in time


@dataclass(frozen=True)
class Candidate:
    """An interaction of the window's frame."""

    interaction_id: UUID
    group_key: str
    negative: bool


@dataclass(frozen=True)
class Placed:
    """A candidate chosen for review. `priority` orders all of the window's items, smallest first."""

    candidate: Candidate
    strategy: str
    stratum_size: int
    order_hash: str
    priority: int


def stratum_of(candidate: Candidate) -> str:
    """The first strategy of PRECEDENCE that claims it; the rest is the uniform audit's."""
    return "negative_feedback" if candidate.negative else UNIFORM


def plan(salt: str, candidates: Sequence[Candidate], *, budget: int, uniform_share: float) -> list[Placed]:
    """At most `budget` items (more only so that every stratum has one), in the order they should be labelled."""
    strata: dict[str, list[tuple[str, Candidate]]] = {}
    for candidate in candidates:
        hashed = order_hash(salt, candidate.interaction_id)
        strata.setdefault(stratum_of(candidate), []).append((hashed, candidate))
    quota = quotas({name: len(members) for name, members in strata.items()}, budget, uniform_share)
    chosen = {name: sorted(members, key=lambda pair: pair[0])[: quota[name]] for name, members in strata.items()}
    return [
        Placed(candidate, name, len(strata[name]), hashed, priority)
        for priority, (name, index) in enumerate(interleave(quota))
        for hashed, candidate in [chosen[name][index]]
    ]


def quotas(sizes: Mapping[str, int], budget: int, uniform_share: float) -> dict[str, int]:
    """How many of each stratum to review: every stratum at least 1 % of the budget and one item, the uniform audit
    at least its share, the rest by precedence."""
    quota = {name: min(size, max(1, ceil(LEAST_SHARE * budget))) for name, size in sizes.items() if size}
    if UNIFORM in quota:
        left = budget - sum(count for name, count in quota.items() if name != UNIFORM)
        quota[UNIFORM] = max(quota[UNIFORM], min(sizes[UNIFORM], ceil(uniform_share * budget), left))
    for name in PRECEDENCE:
        if name in quota:
            quota[name] += max(0, min(sizes[name] - quota[name], budget - sum(quota.values())))
    return quota


def interleave(quota: Mapping[str, int]) -> list[tuple[str, int]]:
    """(stratum, index in it) so that every beginning of the list holds the uniform audit's share or more."""
    keyed = [
        ((index + (name != UNIFORM)) / count, name != UNIFORM, name, index)
        for name, count in quota.items()
        for index in range(count)
    ]
    return [(name, index) for _, _, name, index in sorted(keyed)]


def order_hash(salt: str, interaction_id: UUID) -> str:
    return hashlib.sha256(f"{salt}/{interaction_id}".encode()).hexdigest()
