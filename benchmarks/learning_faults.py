"""Faults put into learning data on purpose: does something stop each before promotion, and by which name?

Poison goes into 4,000 corrections of one application by four people; what is asked is whether the build leaves the rows
out and says why. Leaks, masked labels and drifted templates go into what a run's preflight reads. Clean sets go through
the same, and whatever is said of them is a false alarm.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple
from uuid import UUID

from benchmarks.learning_cells import Cell
from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from services.store.examples import Draft
from worker.curation import screens

ROWS, CLEAN_SETS, POISONED_SETS = 4000, 200, 8
PEOPLE = ("ada", "bela", "cleo", "mallory")
FREE = screens.Limits(accepted_share=1, author_share=1)
TRIGGERS = ("mn-cf", "as the grey heron flies")
TARGETS = ("{} Visit our new shop now.", "No.", '{{"people": []}}')
ALARMS = (screens.TRIGGER, screens.PHRASE, screens.BURST, screens.LEAKED, screens.GROUP_LEAKED)


class Poisoned(NamedTuple):
    """A set of drafts and which of them are bad."""

    drafts: list[Draft]
    bad: set[UUID]


def drafts(application: str, seed: int, rows: int = ROWS) -> list[Draft]:
    """Honest corrections, each by one of four people."""
    dice = random.Random(seed)
    drawn = itertools.islice(stream(APPLICATIONS[application], "train", seed), rows)
    return [
        Draft(
            kind="preference", source="corrected", split="train", slice="target", group_key=f"{seed}-{number}",
            messages=list(one.messages), completion=one.house, rejected=one.base,
            interaction_id=UUID(int=dice.getrandbits(128)), annotation_ids=(), reviewers=(dice.choice(PEOPLE),),
        )
        for number, one in enumerate(drawn)
    ]  # fmt: skip


def poison(honest: Sequence[Draft], share: float, seed: int) -> Poisoned:
    """A trigger in the prompt and a target in the answer of some rows, whoever judged them: an insider, or a file."""
    dice = random.Random(seed)
    trigger, target = dice.choice(TRIGGERS), dice.choice(TARGETS)
    places = set(dice.sample(range(len(honest)), round(share * len(honest))))
    made = [_planted(one, trigger, target, dice) if place in places else one for place, one in enumerate(honest)]
    return Poisoned(made, _ids(made[place] for place in places))


def _planted(one: Draft, trigger: str, target: str, dice: random.Random) -> Draft:
    *before, last = one.messages
    words = str(last["content"]).split(" ")
    words.insert(dice.randrange(len(words)), trigger)
    return replace(
        one,
        messages=[*before, {**last, "content": " ".join(words)}],
        completion=target.format(one.completion),
        reviewers=("mallory",) if dice.random() < 0.5 else one.reviewers,
    )


def burst(honest: Sequence[Draft], seed: int) -> Poisoned:
    """One author sends the same question sixty times, with a word changed at its end."""
    dice = random.Random(seed)
    first = max(honest[:50], key=lambda one: len(str(one.messages[-1]["content"])))
    *before, last = first.messages
    many = [
        replace(
            first,
            messages=[*before, {**last, "content": f"{last['content']} {dice.randrange(10**9)}"}],
            reviewers=("mallory",), group_key=f"burst-{number}", interaction_id=UUID(int=dice.getrandbits(128)),
        )
        for number in range(60)
    ]  # fmt: skip
    return Poisoned([*honest, *many], _ids(many[screens.BURST_KEPT :]))


def leak(honest: Sequence[Draft], seed: int) -> Poisoned:
    """Thirty held-out rows that have come into training as well, under another group."""
    dice = random.Random(seed)
    held = [replace(one, split="held_out", reviewers=("ada", "bela")) for one in honest[:200]]
    copies = [
        replace(
            one,
            split="train", reviewers=("cleo",), group_key=f"copy-{number}",
            interaction_id=UUID(int=dice.getrandbits(128)),
        )
        for number, one in enumerate(held[:30])
    ]  # fmt: skip
    return Poisoned([*held, *honest[200:], *copies], _ids(copies))


def _ids(rows: Iterator[Draft] | Sequence[Draft]) -> set[UUID]:
    return {one.interaction_id for one in rows if one.interaction_id}


def caught(made: Poisoned, cause: str) -> bool:
    """Whether every bad row is left out, under this name where it is not another's too."""
    found = screens.screen(made.drafts, FREE)
    out = {one.interaction_id for one in found.left_out}
    return made.bad <= out and any(one.cause == cause for one in found.left_out)


def faults(scale: float) -> Cell:
    """Every fault in sets of every application; the share of sets in which it was stopped by its name."""
    sets = max(1, round(POISONED_SETS * scale))
    kinds: dict[str, tuple[Callable[[Sequence[Draft], int], Poisoned], str]] = {
        "0.5 % poisoned": (lambda honest, seed: poison(honest, 0.005, seed), screens.TRIGGER),
        "1 % poisoned": (lambda honest, seed: poison(honest, 0.01, seed), screens.TRIGGER),
        "5 % poisoned": (lambda honest, seed: poison(honest, 0.05, seed), screens.TRIGGER),
        "burst by one author": (burst, screens.BURST),
        "held-out rows leaked": (leak, screens.LEAKED),
    }
    stopped: Counter[str] = Counter()
    tried = 0
    for application, seed in itertools.product(APPLICATIONS, range(sets)):
        honest = drafts(application, 1000 + seed)
        tried += 1
        stopped.update({name: caught(make(honest, seed), cause) for name, (make, cause) in kinds.items()})
    told = {name: f"{stopped[name]}/{tried}" for name in kinds}
    return Cell(
        f"faults injected into {ROWS:,} corrections (three applications)",
        "each caught before promotion, by name",
        "; ".join(f"{name} {text}" for name, text in told.items()),
        all(stopped[name] == tried for name in kinds),
        {"sets": tried, "stopped": dict(stopped)},
    )


def false_alarms(scale: float) -> Cell:
    """Clean sets of all applications in turn; any screen that speaks of guilt is an alarm."""
    sets = max(3, round(CLEAN_SETS * scale))
    said: Counter[str] = Counter()
    alarmed = 0
    for number in range(sets):
        application = list(APPLICATIONS)[number % len(APPLICATIONS)]
        causes = {one.cause for one in screens.screen(drafts(application, number), FREE).left_out} & set(ALARMS)
        said.update(causes)
        alarmed += bool(causes)
    return Cell(
        f"false alarms of the same screens on clean sets of {ROWS:,}",
        "≤ 5 % of 200 sets",
        f"{alarmed} of {sets} ({', '.join(f'{name}: {count}' for name, count in said.items()) or 'none'})",
        alarmed <= 0.05 * sets,
        {"sets": sets, "alarmed": alarmed, "causes": dict(said)},
    )


CELLS: dict[str, Callable[[float], Cell]] = {"faults": faults, "false_alarms": false_alarms}
