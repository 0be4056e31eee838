"""What the gate lets through and what it stops, by simulation of the real `worker.gate.decide.decide`.

    python -m benchmarks.learning_gate [SCALE]

Every project is drawn anew: its held-out rows once, then one candidate after the other on the same rows. Scores are
right or wrong (1 or 0); a share of the pairs differs between the two sides.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.learning_cells import Cell, share
from worker.gate.decide import Decision, Policy, Table, decide

Floats = NDArray[np.float64]
PROJECTS, CANDIDATES, REPEATS = 1000, 20, 4000
DISCORDANT, TARGET_PAIRS, GUARD_PAIRS = 0.15, 600, 2400
SEED = 6


class World(NamedTuple):
    """How the candidates of one sort of project come about. `groups` 0 is a group a row; the smaller `evenness`, the
    more their sizes differ."""

    what: str
    rows: int = TARGET_PAIRS
    groups: int = 0
    shared: float = 0.0
    guards: tuple[int, ...] = ()
    graded: bool = False
    evenness: float = 2.0


WORLDS = (
    World("independent candidates"),
    World("candidates that share four fifths of their changes", shared=0.8),
    World("rows in 60 groups that win and lose together", groups=60),
    World("graded scores, 40 groups of uneven size, candidates alike", rows=300, groups=40, shared=0.5, graded=True),
    World("30 groups of which a few hold most rows", rows=300, groups=30, evenness=0.4),
    World("two guards of 2,400 pairs", guards=(GUARD_PAIRS, GUARD_PAIRS)),
)


# --- successive candidates without a difference -----------------------------------------------------------


def null_candidates(world: World, dice: np.random.Generator) -> Iterator[dict[str, Table]]:
    """Candidates on one frozen held-out set, none of which is better or worse than what serves in truth."""
    sizes = {"target": world.rows} | {f"guard {place}": rows for place, rows in enumerate(world.guards)}
    groups = {name: _groups(world, rows, dice) for name, rows in sizes.items()}
    baselines = {name: _baseline(world, found, dice) for name, found in groups.items()}
    lineage = {name: _changes(world, groups[name], dice) for name in sizes}
    for _ in range(CANDIDATES):
        tables = {}
        for name in sizes:
            own = _changes(world, groups[name], dice)
            inherited = _per_group(dice.random(len(own)) < world.shared, groups[name], world.groups)
            candidate = np.clip(baselines[name] + np.where(inherited, lineage[name], own), 0.0, 1.0)
            tables[name] = Table(baselines[name], candidate, groups[name])
        yield tables


def _groups(world: World, rows: int, dice: np.random.Generator) -> NDArray[Any]:
    """Groups of uneven size: some have many times the rows of others."""
    if not world.groups:
        return np.arange(rows)
    shares = dice.dirichlet(np.full(world.groups, world.evenness))
    return np.concatenate([np.arange(world.groups), dice.choice(world.groups, rows - world.groups, p=shares)])


def _baseline(world: World, groups: NDArray[Any], dice: np.random.Generator) -> Floats:
    """Half right: a change that flips half of the rows at random then gains and loses alike in truth."""
    if world.graded:
        return np.full(len(groups), 0.5)
    return (dice.random(len(groups)) < 0.5).astype(float)


def _changes(world: World, groups: NDArray[Any], dice: np.random.Generator) -> Floats:
    """What a candidate adds: symmetric around nothing, the same for a whole group where there are groups.

    A gain on a row that is right already, and a loss on one that is wrong, are cut off: half of all changes are.
    """
    share = DISCORDANT if world.graded else 2 * DISCORDANT
    sizes = dice.choice([0.1, 0.25, 0.5], len(groups)) if world.graded else np.ones(len(groups))
    changes = np.where(dice.random(len(groups)) < share, dice.choice([-1.0, 1.0], len(groups)) * sizes, 0.0)
    return _per_group(changes, groups, world.groups)


def _per_group(values: NDArray[Any], groups: NDArray[Any], count: int) -> NDArray[Any]:
    """The first `count` values, one for each group; as they are where every row is its own."""
    return values[groups] if count else values


def ever_promoted(world: World, seed: int) -> bool:
    """One project's life: does any of its candidates pass?"""
    carried, policy = 0.0, Policy()
    for look, tables in enumerate(null_candidates(world, np.random.default_rng(seed)), 1):
        decision = decide(tables, look=look, carried=carried, policy=policy)
        if decision.promote:
            return True
        carried = decision.carry
    return False


def looks(scale: float) -> Cell:
    """The first row of the table: 20 looks at one held-out set by candidates that are no better."""
    projects = max(20, round(PROJECTS * scale))
    found = {
        world.what: sum(ever_promoted(world, SEED + 1_000_003 * place + index) for index in range(projects))
        for place, world in enumerate(WORLDS)
    }
    worst = max(found, key=lambda name: found[name])
    told = "; ".join(f"{name}: {share(count, projects)}" for name, count in found.items())
    return Cell(
        what=f"{projects:,} simulated projects, each trying {CANDIDATES} successive null candidates on one frozen "
        "held-out set",
        goal="any promotion in ≤ 5 % of projects",
        measured=f"{share(found[worst], projects)} in the worst of {len(WORLDS)} worlds ({told})",
        met=found[worst] <= 0.05 * projects,
        raw={"projects": projects, "promoted": found},
    )


# --- a candidate with a difference ------------------------------------------------------------------------


def pairs(rows: int, effect: float, dice: np.random.Generator) -> Table:
    """Independent pairs of which 15 % differ, with this true difference of the two shares of right answers."""
    lot = dice.random(rows)
    gain, loss = (DISCORDANT + effect) / 2, (DISCORDANT - effect) / 2
    right = (dice.random(rows) < 0.7).astype(float)
    baseline = np.where(lot < gain, 0.0, np.where(lot < gain + loss, 1.0, right))
    candidate = np.where(lot < gain, 1.0, np.where(lot < gain + loss, 0.0, right))
    return Table(baseline, candidate, np.arange(rows))


def first_look(target: float, guards: tuple[float, ...], seed: int) -> Decision:
    """What the gate says the first time about a candidate with these true differences."""
    dice = np.random.default_rng(seed)
    tables = {f"guard {place}": pairs(GUARD_PAIRS, effect, dice) for place, effect in enumerate(guards)}
    return decide({"target": pairs(TARGET_PAIRS, target, dice), **tables}, look=1)


def power(scale: float) -> Cell:
    """The second row: a gain of five points is seen at the first look."""
    repeats = max(50, round(REPEATS * scale))
    promoted = sum(first_look(0.05, (0.0, 0.0), SEED + index).promote for index in range(repeats))
    return Cell(
        what=f"true +5 points on target ({TARGET_PAIRS} pairs), 0 on two guards ({GUARD_PAIRS:,} pairs each), 15 % "
        "discordance, margin 3, first look",
        goal="promoted ≥ 80 %",
        measured=share(promoted, repeats),
        met=promoted >= 0.8 * repeats,
        raw={"repeats": repeats, "promoted": promoted},
    )


def harm(scale: float) -> Cell:
    """The third row: three points lost on one guard."""
    repeats = max(50, round(REPEATS * scale))
    blocked = sum(not first_look(0.05, (-0.03, 0.0), SEED + index).promote for index in range(repeats))
    named = sum(_names_the_guard(first_look(0.2, (-0.03, 0.0), SEED + index)) for index in range(repeats))
    return Cell(
        what="same, true −3 points on one guard",
        goal="blocked ≥ 90 %",
        measured=f"{share(blocked, repeats)}; by that guard, and with +20 points on target: {share(named, repeats)}",
        met=min(blocked, named) >= 0.9 * repeats,
        raw={"repeats": repeats, "blocked": blocked, "blocked by the guard": named},
    )


def _names_the_guard(decision: Decision) -> bool:
    """Blocked, and for the loss on this guard."""
    return not decision.promote and any(reason.startswith("may be worse on guard 0") for reason in decision.reasons)


CELLS: dict[str, Callable[[float], Cell]] = {"looks": looks, "power": power, "harm": harm}


if __name__ == "__main__":
    for cell in CELLS.values():
        print(cell(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0), flush=True)
