"""How often drift is called where there is none, and how soon it is where there is: the figures of docs/drift.md.

    python -m benchmarks.drift_simulation [--scale 1.0]

Input: days of traffic whose users come in sessions, with mornings unlike nights and weekends unlike weekdays, looked at
daily for four weeks after a deployment. Quality: strata of a queue with a known share of right answers, labelled daily.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from services.store.drift import DAYS_BEFORE, DAYS_NOW
from services.store.drift_rules import Prompt, dropped, moved
from services.store.quality import Estimate, Stratum, estimate

WEEKS_LOOKED = 4
OPENINGS = ("note:", "text:", "please", "what", "how", "list", "the", "find")
TENANTS = ("desk", "web", "mobile", "partner")


class World(NamedTuple):
    """What is asked: the length of prompts, how they begin, and who sends them."""

    stretch: float = 1.0
    new_share: float = 0.0
    tenants: Sequence[float] = (0.5, 0.3, 0.15, 0.05)


class Found(NamedTuple):
    """Of so many projects the share where drift was called, and the median day it was called on."""

    what: str
    projects: int
    called: float
    median_day: float | None


def day(dice: random.Random, world: World, weekday: int, size: int) -> list[Prompt]:
    """`size` prompts, one of each session; weekends are shorter and from other tenants, each day a bit its own."""
    weekend = weekday >= 5
    mood = dice.gauss(0.0, 0.06)
    weights = [share * (1.6 if weekend and place == 2 else 1.0) * dice.uniform(0.8, 1.25)
               for place, share in enumerate(world.tenants)]  # fmt: skip
    favours = [dice.uniform(0.8, 1.25) for _ in OPENINGS]
    return [_prompt(dice, world, weights, favours, mood - (0.1 if weekend else 0.0)) for _ in range(size)]


def _prompt(
    dice: random.Random, world: World, weights: Sequence[float], favours: Sequence[float], mood: float
) -> Prompt:
    fresh = dice.random() < world.new_share
    opening = "summarise" if fresh else dice.choices(OPENINGS, favours)[0]
    length = int(dice.lognormvariate(4.6 + mood, 0.45) * world.stretch)
    return Prompt(length, opening, {"app": dice.choices(TENANTS, weights)[0], "request": str(dice.random())})


def input_looks(dice: random.Random, after: World, size: int) -> int | None:
    """The day on which the input is said to have moved, of WEEKS_LOOKED weeks of daily looks after a deployment."""
    before = [day(dice, World(), place % 7, size) for place in range(DAYS_BEFORE)]
    since: list[list[Prompt]] = []
    for place in range(7 * WEEKS_LOOKED):
        since.append(day(dice, after, place % 7, size))
        now = [prompt for one in since[-DAYS_NOW:] for prompt in one]
        if moved(before, now) is not None:
            return place + 1
    return None


def quality_looks(dice: random.Random, right: float, now: float, labels: int) -> int | None:
    """The day on which quality is said to have dropped, of eight weeks; it changes at the end of the fourth."""
    days: list[list[Stratum]] = []
    for place in range(56):
        share = right if place < 28 else now
        days.append([_stratum(dice, "uniform", 4000, labels // 3, share),
                     _stratum(dice, "negative_feedback", 200, labels - labels // 3, share - 0.3)])  # fmt: skip
        cut = max(len(days) - 7, len(days) // 2)
        if dropped(_pooled(days[:cut]), _pooled(days[cut:])) is not None:
            return place + 1
    return None


def _stratum(dice: random.Random, name: str, size: int, labels: int, share: float) -> Stratum:
    return Stratum(name, size, labels, float(sum(dice.random() < share for _ in range(labels))))


def _pooled(days: Sequence[Sequence[Stratum]]) -> Estimate | None:
    return estimate([stratum for one in days for stratum in one])


def many(what: str, projects: int, look: Callable[[random.Random], int | None], after: int = 0) -> Found:
    """`after` is the day the change came; calls before it are false."""
    found = [look(random.Random(seed)) for seed in range(projects)]
    called = sorted(one - after for one in found if one is not None)
    return Found(what, projects, len(called) / projects, called[len(called) // 2] if called else None)


def run(scale: float) -> list[Found]:
    """Every line of the table."""
    size, worlds = max(5, round(100 * scale)), max(20, round(1000 * scale))
    table = [
        many("input: nothing changes, 400 prompts a day", size, lambda dice: input_looks(dice, World(), 400)),
        many("input: nothing changes, 110 prompts a day", size, lambda dice: input_looks(dice, World(), 110)),
        many("input: a fifth asks something new", size, lambda dice: input_looks(dice, World(new_share=0.2), 400)),
        many("input: prompts twice as long", size, lambda dice: input_looks(dice, World(stretch=2.0), 400)),
        many("input: another tenant sends half", size,
             lambda dice: input_looks(dice, World(tenants=(0.2, 0.2, 0.1, 0.5)), 400)),
        many("input: prompts a twentieth longer", size, lambda dice: input_looks(dice, World(stretch=1.05), 400)),
    ]  # fmt: skip
    for labels in (24, 60):
        table += [
            many(f"quality: nothing changes, {labels} labels a day", worlds,
                 lambda dice, n=labels: quality_looks(dice, 0.85, 0.85, n)),  # type: ignore[misc]
            many(f"quality: 85 to 75 %, {labels} labels a day", worlds,
                 lambda dice, n=labels: quality_looks(dice, 0.85, 0.75, n), after=28),  # type: ignore[misc]
            many(f"quality: 85 to 65 %, {labels} labels a day", worlds,
                 lambda dice, n=labels: quality_looks(dice, 0.85, 0.65, n), after=28),  # type: ignore[misc]
        ]  # fmt: skip
    return table


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 is the published size")
    print("| | Projects | Called | Median day |\n|---|---|---|---|")
    for row in run(parser.parse_args().scale):
        day_ = "–" if row.median_day is None else f"{row.median_day:g}"
        print(f"| {row.what} | {row.projects:,} | {100 * row.called:.1f} % | {day_} |", flush=True)


if __name__ == "__main__":
    main()
