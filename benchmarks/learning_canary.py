"""Canaries simulated: how often chance ends one, and how soon a harm does.

    python -m benchmarks.learning_canary [SCALE]

Users come and go, ask a few times each and differ in how well they are served, so that outcomes of one user resemble
one another. After every single outcome the judging function of the dispatcher is asked, `worker.rollout.judge.judge`,
with all its guardrails on measured values, and the first thing it says ends the trial.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from benchmarks.learning_cells import Cell, share
from services.store.rollout_config import RolloutConfig
from services.store.rollout_counts import MOST_WEIGHT, Arms, Moments
from worker.rollout.judge import RAILS, Action, Evidence, judge

Summaries = Mapping[str, Mapping[str, Any]]
RUNS = 1000
WORKERS = 2
# Users who are there at the same time; each leaves after an answer with this chance, so they ask five times on average.
AT_ONCE = 50
LEAVING = 0.2
# Of the variance of an outcome, how much is the user's own (intraclass correlation).
ALIKE = 0.1
# No trial is followed further: ten times what a decision usually takes.
LONGEST = 40_000


class World(NamedTuple):
    """How often answers of either arm satisfy, and the candidate's share of users. `ends`: what ends a trial."""

    control: float
    canary: float
    share: float = 0.1
    ends: tuple[Action, ...] = ("promote", "roll_back", "hold")
    longest: int = LONGEST
    alike: float = ALIKE


UNPROMOTED = World(0.9, 0.9, ends=("roll_back", "hold"), longest=6000)
HARMS = ((0.9, 0.8, 0.1), (0.8, 0.7, 0.1), (0.9, 0.8, 0.5))


class Ending(NamedTuple):
    """The last verdict, and the requests of either arm until then."""

    action: Action
    reason: str
    canary: int
    control: int


class User:
    """Somebody who asks. `satisfied` is their own chance to like an answer, `verbose` how long answers to them are."""

    __slots__ = ("arm", "number", "satisfied", "verbose")

    def __init__(self, number: int, world: World, dice: random.Random) -> None:
        self.number = number
        self.arm = 0 if dice.random() < world.share else 1
        mean, spread = (world.canary, world.control)[self.arm], 1 / world.alike - 1
        self.satisfied = dice.betavariate(mean * spread, (1 - mean) * spread)
        self.verbose = dice.gauss(4.0, 0.3)

    def outcomes(self, dice: random.Random) -> dict[str, float]:
        """One answer by metric: only the signal differs between the arms."""
        return {
            "signal": float(dice.random() < self.satisfied),
            "errors": float(dice.random() < 0.01),
            "latency": float(dice.random() < 0.05),
            "ttft": float(dice.random() < 0.05),
            "length": dice.gauss(self.verbose, 0.4),
            "refusals": float(dice.random() < 0.02),
            "acceptance": min(1.0, max(0.0, dice.gauss(0.6, 0.2))),
        }


class Sums:
    """The sums over users that the database makes, kept up to date one outcome at a time."""

    def __init__(self) -> None:
        self.moments = Moments(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self._users: dict[int, tuple[int, float]] = {}

    def add(self, user: int, value: float) -> None:
        n, total = self._users.get(user, (0, 0.0))
        self._users[user] = (n + 1, total + value)
        before, after = float(min(n, MOST_WEIGHT)), float(min(n + 1, MOST_WEIGHT))
        old, new = (total / n * before if n else 0.0), (total + value) / (n + 1) * after
        users, outcomes, w, y, yy, yw, ww = self.moments
        self.moments = Moments(
            users + (not n), outcomes + 1, w + after - before, y + new - old, yy + new * new - old * old,
            yw + new * after - old * before, ww + after * after - before * before,
        )  # fmt: skip


def traffic(world: World, dice: random.Random) -> Iterator[User]:
    """Who asks next, for ever."""
    there = [User(number, world, dice) for number in range(AT_ONCE)]
    following = AT_ONCE
    while True:
        place = dice.randrange(AT_ONCE)
        yield there[place]
        if dice.random() < LEAVING:
            there[place] = User(following, world, dice)
            following += 1


def trial(seed: int, world: World, config: RolloutConfig) -> Ending:
    """One canary from its first request to what ends it, judged after every outcome."""
    dice = random.Random(seed)
    sums = {name: (Sums(), Sums()) for name in ("signal", *RAILS)}
    requests, seen = [0, 0], (set[int](), set[int]())
    for user in traffic(world, dice):
        requests[user.arm] += 1
        seen[user.arm].add(user.number)
        for name, value in user.outcomes(dice).items():
            sums[name][user.arm].add(user.number, value)
        verdict = judge(
            Evidence(
                {name: Arms(arms[0].moments, arms[1].moments) for name, arms in sums.items()},
                (requests[0], requests[1]), (len(seen[0]), len(seen[1])), world.share,
            ),
            config,
            in_full=False,
        )  # fmt: skip
        if verdict.action in world.ends or sum(requests) >= world.longest:
            return Ending(verdict.action, verdict.reason, requests[0], requests[1])
    raise AssertionError("traffic has no end")


def trials(runs: int, world: World, config: RolloutConfig, *, seed: int = 0) -> list[Ending]:
    """Many of them, on two cores."""
    with ProcessPoolExecutor(WORKERS) as pool:
        one = partial(trial, world=world, config=config)
        return list(pool.map(one, range(seed, seed + runs), chunksize=5))


def summary(endings: list[Ending]) -> dict[str, Any]:
    """Counts and medians by how trials ended."""
    counts = Counter(ending.action for ending in endings)
    found: dict[str, Any] = {"runs": len(endings), "endings": dict(counts)}
    for action in counts:
        these = [ending for ending in endings if ending.action == action]
        found[f"{action}_median_canary"] = median(one.canary for one in these)
        found[f"{action}_median_all"] = median(one.canary + one.control for one in these)
    by_guard = Counter(one.reason.split(":")[0] for one in endings if one.action in ("roll_back", "hold"))
    return found | {"ended_by": dict(by_guard)}


def peeking(scale: float) -> Cell:
    """No difference: the share of canaries that are rolled back or held all the same, or never promoted."""
    runs = max(20, round(RUNS * scale))
    # Nothing but a roll-back ends the second: what a canary that nobody promotes risks.
    raw = {
        "no difference": summary(trials(runs, World(0.9, 0.9), RolloutConfig())),
        "no difference, never promoted": summary(trials(max(10, runs // 4), UNPROMOTED, RolloutConfig(), seed=10**6)),
    }
    measured, met = told_of_peeking(raw)
    what = "peeking canary, no difference, looked at after every outcome"
    return Cell(what, "wrongly ended ≤ 5 %", measured, met, raw)


def told_of_peeking(raw: Summaries) -> tuple[str, bool]:
    """In words, and whether the goal is met."""
    ended, lasting = raw.values()
    measured = (
        f"{share(_ended(ended), ended['runs'])} of {ended['runs']:,} wrongly ended "
        f"({share(_ended(lasting), lasting['runs'])} of {lasting['runs']:,} that nobody promotes, within "
        f"{UNPROMOTED.longest:,} requests); {share(ended['endings'].get('promote', 0), ended['runs'])} promoted, "
        f"median after {ended['promote_median_canary']:,.0f} requests of the candidate"
    )
    return measured, max(_ended(one) / one["runs"] for one in raw.values()) <= 0.05


def harm(scale: float) -> Cell:
    """Ten points worse: how many requests of the candidate until it is rolled back."""
    runs = max(20, round(RUNS * scale))
    raw = {
        f"{control:.0%} to {canary:.0%}, {part:.0%} of users": summary(
            trials(runs, World(control, canary, part), RolloutConfig(share=part), seed=2 * 10**6)
        )
        for control, canary, part in HARMS
    }
    measured, met = told_of_harm(raw)
    what = "canary with a 10-point harm (90 % to 80 %, outcomes clustered by user)"
    return Cell(what, "rolled back, median ≤ 300 requests", measured, met, raw)


def told_of_harm(raw: Summaries) -> tuple[str, bool]:
    """In words, and whether the goal is met: by the first of them, 10 % of the users."""
    first, *_ = raw.values()
    back, runs, needed = first["endings"].get("roll_back", 0), first["runs"], first["roll_back_median_canary"]
    others = "; ".join(f"{one['roll_back_median_canary']:,.0f} with {name}" for name, one in list(raw.items())[1:])
    measured = (
        f"{share(back, runs)} of {runs:,} rolled back, median after {needed:,.0f} requests of the candidate "
        f"({first['roll_back_median_all']:,.0f} of both arms); {share(first['endings'].get('promote', 0), runs)} "
        f"wrongly promoted; medians elsewhere: {others}"
    )
    return measured, needed <= 300 and back / runs >= 0.95


def _ended(found: Mapping[str, Any]) -> int:
    """How many were rolled back or held."""
    return sum(found["endings"].get(action, 0) for action in ("roll_back", "hold"))


CELLS: dict[str, Callable[[float], Cell]] = {"canary_peeking": peeking, "canary_harm": harm}


if __name__ == "__main__":
    for cell in CELLS.values():
        print(cell(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0))
