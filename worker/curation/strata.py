"""The sampling plan of one closed window, as pure functions: strata, quotas, the order of labelling.

Every interaction belongs to exactly one stratum. Inside a stratum the order is a hash, so whatever part of it has
been labelled is a random sample of it, and labelled / size is its inclusion probability as realised.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from uuid import UUID

from services.store.sampling import LEAST_AUDIT, PRECEDENCE, UNIFORM

LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Candidate:
    """An interaction of the window's frame, with the strategies that claim it."""

    interaction_id: UUID
    group_key: str
    claims: frozenset[str] = frozenset()


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
    return next((name for name in PRECEDENCE if name in candidate.claims), UNIFORM)


def plan(salt: str, candidates: Sequence[Candidate], *, budget: int, mix: Mapping[str, float]) -> list[Placed]:
    """At most `budget` items (more only so that every stratum has one), in the order they should be labelled."""
    strata: dict[str, list[tuple[str, Candidate]]] = {}
    for candidate in candidates:
        hashed = order_hash(salt, candidate.interaction_id)
        strata.setdefault(stratum_of(candidate), []).append((hashed, candidate))
    quota = quotas({name: len(members) for name, members in strata.items()}, budget, mix)
    chosen = {name: sorted(members, key=lambda pair: pair[0])[: quota[name]] for name, members in strata.items()}
    return [
        Placed(candidate, name, len(strata[name]), hashed, priority)
        for priority, (name, index) in enumerate(interleave(quota))
        for hashed, candidate in [chosen[name][index]]
    ]


def quotas(sizes: Mapping[str, int], budget: int, mix: Mapping[str, float]) -> dict[str, int]:
    """How many of each stratum to review: every stratum at least 1 % of the budget and one item, then the uniform
    audit and the others their shares of it, and what is left by precedence."""
    quota = {name: min(size, max(1, ceil(LEAST_SHARE * budget))) for name, size in sizes.items() if size}
    ordered = [name for name in (UNIFORM, *PRECEDENCE[:-1]) if name in quota]
    for name in ordered:
        _grow(quota, name, min(sizes[name], ceil(mix.get(name, 0.0) * budget - 1e-9)), budget)
    for name in (*ordered[1:], *ordered[:1]):
        _grow(quota, name, sizes[name], budget)
    if UNIFORM in quota:
        # Where the least of many strata fills a small budget, the audit keeps its share beyond it.
        share, others = mix.get(UNIFORM, 0.0), sum(quota.values()) - quota[UNIFORM]
        share = share if share < 1 else LEAST_AUDIT
        wanted = ceil(others * share / (1 - share) - 1e-9)
        quota[UNIFORM] = max(quota[UNIFORM], min(sizes[UNIFORM], wanted))
    return quota


def _grow(quota: dict[str, int], name: str, wanted: int, budget: int) -> None:
    quota[name] += max(0, min(wanted - quota[name], budget - sum(quota.values())))


def interleave(quota: Mapping[str, int]) -> list[tuple[str, int]]:
    """(stratum, index in it) so that every beginning of the list holds the uniform audit's share or more, and no
    stratum waits long for its first label: until each has one, nothing can be estimated."""
    total, audit = sum(quota.values()), quota.get(UNIFORM, 0)
    placed = dict.fromkeys(sorted(quota), 0)
    order: list[tuple[str, int]] = []
    while len(order) < total:
        others = [name for name, count in placed.items() if name != UNIFORM and count < quota[name]]
        due = placed.get(UNIFORM, 0) * total < audit * (len(order) + 1)
        first = UNIFORM if due or not others else min(others, key=lambda one: _turn(placed[one], quota[one]))
        order.append((first, placed[first]))
        placed[first] += 1
    return order


def _turn(placed: int, quota: int) -> tuple[bool, float]:
    """Strata without an item go first, then whoever is furthest behind."""
    return placed > 0, (placed + 1) / quota


def order_hash(salt: str, interaction_id: UUID) -> str:
    return hashlib.sha256(f"{salt}/{interaction_id}".encode()).hexdigest()
