"""A sweep inside one run: candidates around the run's own parameters, successive halving, the best one trained in full.

Every candidate gets a quarter of the steps, the better half of them half the steps, and so on (Jamieson & Talwalkar,
AISTATS 2016); the last one standing is what the run then trains on everything. Candidates are compared on validation
rows, groups of the train split that no trial saw. The held-out part is the gate's and is never looked at.

A trial's schedule ends with its own steps, so a rung starts again: a learning rate cut off at its height says little.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec

from worker.training.spec import Spec, Trial
from worker.training.validation import Measured

FIRST_SHARE = 0.25
WORST = 1e9
# Factors of the run's own values; the first candidate is the run as it was asked for.
FACTORS: Mapping[str, tuple[float, ...]] = {"lr": (0.25, 0.5, 1.0, 2.0, 4.0), "epochs": (0.5, 1.0, 2.0)}
PREFERENCE_FACTORS: Mapping[str, tuple[float, ...]] = {"beta": (0.3, 1.0, 3.0)}
MOST: Mapping[str, float] = {"lr": 0.1, "epochs": 100.0, "beta": 10.0}

Changes = dict[str, float]
RunTrial = Callable[[Spec, int], Measured]


class Rated(NamedTuple):
    """A candidate, the steps it got in a rung and what came of them."""

    number: int
    changes: Changes
    steps: int
    found: Measured


def candidates(spec: Spec, count: int, steps_of: Callable[[Spec], int]) -> list[Changes]:
    """The run itself, then others drawn at random, of which no two train alike; the same for the same spec."""
    factors = dict(FACTORS) | (dict(PREFERENCE_FACTORS) if spec.kind in ("dpo", "kto") else {})
    everything: list[dict[str, float]] = [{}]
    for name, choices in factors.items():
        everything = [{**one, name: factor} for one in everything for factor in choices]
    plain = dict.fromkeys(factors, 1.0)
    others = [one for one in everything if one != plain]
    Random(spec.seed).shuffle(others)
    distinct: dict[tuple[float, ...], Changes] = {}
    for changes in ({}, *(_values(spec, one) for one in others)):
        tried = msgspec.structs.replace(spec, **changes)
        distinct.setdefault((tried.lr, tried.beta, steps_of(tried)), changes)
    return list(distinct.values())[:count]


def _values(spec: Spec, factors: Mapping[str, float]) -> Changes:
    return {name: min(MOST[name], getattr(spec, name) * factor) for name, factor in factors.items() if factor != 1.0}


def rungs(count: int) -> list[tuple[int, float]]:
    """(how many candidates, share of their steps) of each rung; the last one leaves one candidate."""
    found, share = [], FIRST_SHARE
    while count > 1:
        found.append((count, min(1.0, share)))
        count, share = math.ceil(count / 2), share * 2
    return found


def halve(
    spec: Spec, steps_of: Callable[[Spec], int], trial: RunTrial, tell: Callable[[Trial], None], log: Path
) -> Changes:
    """Run the rungs; the winner's changes. What `log` holds from an attempt that was killed is not run again."""
    known = _known(log, spec.fingerprint)
    standing = list(enumerate(candidates(spec, spec.sweep, steps_of)))
    for rung, (_, share) in enumerate(rungs(len(standing))):
        measured: list[Rated] = []
        for number, changes in standing:
            tried = msgspec.structs.replace(spec, **changes)
            steps = max(1, math.ceil(share * steps_of(tried)))
            found = known.get((number, rung))
            if found is None:
                found = trial(tried, steps)
                _remember(log, spec.fingerprint, number, rung, found)
            measured.append(Rated(number, changes, steps, found))
        best = sorted(measured, key=lambda one: (_rank(one.found), one.number))[: math.ceil(len(measured) / 2)]
        kept = sorted(one.number for one in best)
        for one in measured:
            tell(_told(one, rung, kept=one.number in kept))
        standing = [(one.number, one.changes) for one in measured if one.number in kept]
    return standing[0][1]


def _told(one: Rated, rung: int, *, kept: bool) -> Trial:
    return Trial(
        candidate=one.number, rung=rung, changes=one.changes, steps=one.steps, loss=_rank(one.found),
        preferred=one.found.preferred, kept=kept,
    )  # fmt: skip


def _rank(found: Measured) -> float:
    """A trial that blew up comes last, with a number that JSON has."""
    return found.loss if math.isfinite(found.loss) else WORST


def _known(log: Path, fingerprint: str) -> dict[tuple[int, int], Measured]:
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            told: dict[str, Any] = json.loads(line)
            if told["fingerprint"] == fingerprint:
                found[told["candidate"], told["rung"]] = Measured(told["loss"], told["preferred"])
        except (ValueError, KeyError):
            continue  # the line that a kill cut short
    return found


def _remember(log: Path, fingerprint: str, number: int, rung: int, found: Measured) -> None:
    told = {"fingerprint": fingerprint, "candidate": number, "rung": rung, **found._asdict()}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(told) + "\n")
