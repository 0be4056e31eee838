"""Does the interval of live quality cover the truth? Streams whose truth is known, sampled and estimated by production.

    python -m benchmarks.sampling_simulation [--streams 2000] [--seed 1] [--publish]

A stream is WINDOWS windows of WINDOW interactions that fail at a given rate. Users complain about half of the failures
and some of the rest, failures are more often unsure or break their schema; so what is flagged is mostly wrong. Each
window is planned by `worker.curation.strata.plan`; reviewers come to `drain` of its items and leave the rest, either in
the queue's order or every complaint first, or in the queue's order beside what leads, who look for failures, had put in
the queue by hand; `services.store.quality.estimate` speaks. Truth is the stream's own share of failures. Compared:
Whet's interval, the normal one and Korn–Graubard's on the same labels, and what a dashboard would say from flagged
items alone, with Wilson's interval.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import sqrt
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from benchmarks.publish import README, between_markers, table
from services.store.quality import Z95, Stratum, estimate, wilson
from services.store.sampling import CHOSEN, DEFAULT_MIX, PRECEDENCE, UNIFORM
from worker.curation.strata import Candidate, Placed, plan

RATES = (0.02, 0.1, 0.3)
WINDOWS, WINDOW, BUDGET = 6, 300, 60
# The share of its items that reviewers come to before a window's queue is left.
DRAIN = (0.6, 0.9)
# How often a signal speaks up: for a failure, and for an answer that is right.
SIGNALS = {
    "negative_feedback": (0.5, 0.02), "schema_failure": (0.1, 0.01), "disagreement": (0.1, 0.02),
    "low_confidence": (0.3, 0.05), "novelty": (0.05, 0.05),
}  # fmt: skip
# How often somebody picks it by hand before its window closes: a failure, and an answer that is right.
PICKED = (0.3, 0.02)
ORDERS = ("the queue's order", "complaints first", "picked by hand too")
METHODS = ("Whet", "normal", "Korn–Graubard", "flagged only")
RESULTS = Path(__file__).parent / "results" / "sampling.md"
BEGIN, END = "<!-- sampling:begin -->", "<!-- sampling:end -->"


class Interval(NamedTuple):
    """An estimated failure rate."""

    rate: float
    low: float
    high: float


class Outcome(NamedTuple):
    """What each method made of one stream; `audit` is the uniform audit's share of the labels."""

    truth: float
    methods: tuple[Interval | None, ...]
    audit: float


class Row(NamedTuple):
    """A method over all streams of one rate and order."""

    rate: float
    order: str
    method: str
    streams: int
    coverage: float
    error: float
    width: float
    audit: float


def simulate(rate: float, order: str, seed: int, *, apart: bool = True) -> Outcome:
    """One stream, reviewed and estimated. What is picked by hand is a stratum of its own; with `apart` False it stays
    in the size of the one it would else have been in, to show what comes of that."""
    random = np.random.default_rng(seed)
    failed_WN = random.random((WINDOWS, WINDOW)) < rate
    claimed = {
        name: random.random((WINDOWS, WINDOW)) < np.where(failed_WN, *chances) for name, chances in SIGNALS.items()
    }
    drains = random.uniform(*DRAIN, WINDOWS)
    picked_WN = np.zeros((WINDOWS, WINDOW), dtype=bool)
    if order == ORDERS[2]:
        picked_WN = random.random((WINDOWS, WINDOW)) < np.where(failed_WN, *PICKED)
    strata: list[Stratum] = []
    for window in range(WINDOWS):
        claims = {name: marks[window] for name, marks in claimed.items()}
        picked = picked_WN[window] if apart else np.zeros(WINDOW, dtype=bool)
        beside = np.zeros(WINDOW, dtype=bool) if apart else picked_WN[window]
        drain = float(drains[window])
        strata += _window(f"{seed}/{window}", failed_WN[window], claims, order, drain, picked, beside)
    labelled = sum(one.labelled for one in strata)
    audit = sum(one.labelled for one in strata if one.strategy == UNIFORM) / max(1, labelled)
    return Outcome(float(failed_WN.mean()), _estimates(strata), audit)


def _window(
    salt: str,
    failed_N: NDArray[np.bool_],
    claims: dict[str, NDArray[np.bool_]],
    order: str,
    drain: float,
    picked_N: NDArray[np.bool_],
    lost_N: NDArray[np.bool_],
) -> list[Stratum]:
    """The window's strata as reviewers leave them: `picked_N` is out of the frame, `lost_N` in it and never drawn."""
    frame = [
        Candidate(UUID(int=index), "", frozenset(name for name, marks in claims.items() if marks[index]))
        for index in range(len(failed_N))
        if not picked_N[index]
    ]
    placed = [
        one for one in plan(salt, frame, budget=BUDGET, mix=DEFAULT_MIX) if not lost_N[one.candidate.interaction_id.int]
    ]
    if order == "complaints first":
        placed = sorted(placed, key=lambda item: (item.strategy != PRECEDENCE[0], item.priority))
    done = placed[: round(drain * len(placed))]
    strata = [_stratum(name, placed, done, failed_N) for name in {item.strategy for item in placed}]
    if picked_N.any():
        seen = np.flatnonzero(picked_N)[: max(1, round(drain * picked_N.sum()))]
        strata.append(Stratum(CHOSEN, int(picked_N.sum()), len(seen), float((~failed_N[seen]).sum())))
    return strata


def _stratum(name: str, placed: Sequence[Placed], done: Sequence[Placed], failed_N: NDArray[np.bool_]) -> Stratum:
    size = next(item.stratum_size for item in placed if item.strategy == name)
    mine = [item.candidate.interaction_id.int for item in done if item.strategy == name]
    return Stratum(name, size, len(mine), float((~failed_N[mine]).sum()))


def _estimates(strata: Sequence[Stratum]) -> tuple[Interval | None, ...]:
    found = estimate(strata)
    whet = None if found is None else Interval(1 - found.rate, 1 - found.high, 1 - found.low)
    flagged = [one for one in strata if one.strategy != UNIFORM and one.labelled]
    return whet, _normal(strata, whet), _korn_graubard(strata, whet), _flagged(flagged)


def _variance(strata: Sequence[Stratum]) -> float:
    """The textbook variance of the stratified mean, windows of a strategy pooled as production pools them."""
    population, total = sum(one.size for one in strata), 0.0
    for name in {one.strategy for one in strata}:
        mine = [one for one in strata if one.strategy == name]
        mean = sum(one.size * one.right / one.labelled for one in mine) / sum(one.size for one in mine)
        total += mean * (1 - mean) * sum(
            (one.size / population) ** 2 * (1 - one.labelled / one.size) / one.labelled for one in mine
        )  # fmt: skip
    return total


def _normal(strata: Sequence[Stratum], whet: Interval | None) -> Interval | None:
    if whet is None:
        return None
    spread = Z95 * sqrt(_variance(strata))
    return Interval(whet.rate, whet.rate - spread, whet.rate + spread)


def _korn_graubard(strata: Sequence[Stratum], whet: Interval | None) -> Interval | None:
    """Clopper–Pearson at the effective sample size of the whole (Korn & Graubard, Survey Methodology 1998)."""
    from scipy.stats import beta, t

    if whet is None:
        return None
    variance, labels = _variance(strata), sum(one.labelled for one in strata)
    if variance == 0:
        return Interval(whet.rate, whet.rate, whet.rate)
    freedom = labels - len(strata)
    labels_eff = whet.rate * (1 - whet.rate) / variance * (t.ppf(0.975, labels - 1) / t.ppf(0.975, freedom)) ** 2
    wrong = whet.rate * labels_eff
    low = float(beta.ppf(0.025, wrong, labels_eff - wrong + 1))
    return Interval(whet.rate, low, float(beta.ppf(0.975, wrong + 1, labels_eff - wrong)))


def _flagged(flagged: Sequence[Stratum]) -> Interval | None:
    labels = sum(one.labelled for one in flagged)
    if not labels:
        return None
    rate = 1 - sum(one.right for one in flagged) / labels
    return Interval(rate, *wilson(rate, 1 / labels))


def run(
    streams: int, seed: int, *, rates: Sequence[float] = RATES, orders: Sequence[str] = ORDERS, processes: int = 2
) -> list[Row]:
    """Every method on `streams` streams of each rate and order; the same seeds for every cell."""
    cells = [(rate, order) for rate in rates for order in orders]
    jobs = [(rate, order, seed * 1_000_003 + one) for rate, order in cells for one in range(streams)]
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            outcomes = list(pool.map(_job, jobs, chunksize=50))
    else:
        outcomes = [_job(job) for job in jobs]
    return [
        _row(rate, order, index, outcomes[place * streams : (place + 1) * streams])
        for place, (rate, order) in enumerate(cells)
        for index in range(len(METHODS))
    ]


def _job(job: tuple[float, str, int]) -> Outcome:
    return simulate(*job)


def _row(rate: float, order: str, index: int, outcomes: Sequence[Outcome]) -> Row:
    """Streams without an estimate, where a stratum has no label, are left out and not counted in `streams`."""
    told = [(one.truth, found) for one in outcomes if (found := one.methods[index]) is not None]
    truth = np.array([one for one, _ in told])
    rates, lows, highs = (np.array([getattr(one, name) for _, one in told]) for name in Interval._fields)
    covered = (lows - 1e-9 <= truth) & (truth <= highs + 1e-9)
    audit = float(np.mean([one.audit for one in outcomes]))
    return Row(
        rate, order, METHODS[index], len(told), float(covered.mean()), float((rates - truth).mean()),
        float((highs - lows).mean()), audit,
    )  # fmt: skip


def page(rows: Sequence[Row], streams: int, command: str) -> str:
    """The table: a line for each rate and order, coverage of each method with its mean error."""
    head = ["failures", "reviewed in", *(f"{name}: covers" for name in METHODS), "Whet: mean error, width",
            "flagged only: mean error", "audit's share of labels"]  # fmt: skip
    lines = [head]
    for rate, order in dict.fromkeys((row.rate, row.order) for row in rows):
        mine = {row.method: row for row in rows if (row.rate, row.order) == (rate, order)}
        whet, flagged = mine["Whet"], mine["flagged only"]
        covers = [f"{100 * mine[name].coverage:.1f} %" for name in METHODS]
        lines.append([
            f"{100 * rate:.0f} %", order, f"**{covers[0]}**", *covers[1:],
            f"{100 * whet.error:+.2f}, {100 * whet.width:.1f} points", f"{100 * flagged.error:+.1f} points",
            f"{100 * whet.audit:.0f} %",
        ])  # fmt: skip
    least = min(row.streams for row in rows if row.method == "Whet")
    low, high = (f"{100 * share:.0f} %" for share in DRAIN)
    return (
        f"How often the 95 % interval of live quality holds the true failure rate: {streams:,} seeded streams a line, "
        f"each {WINDOWS} windows of {WINDOW} answers, {BUDGET} chosen from each, {low} to {high} of them reviewed "
        f"({least:,} or more streams had labels in every stratum). `{command}`\n\n{table(lines)}\n"
    )


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Simulate, print, and with --publish write the page and README's part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--publish", action="store_true")
    chosen = parser.parse_args(arguments)
    command = f"python -m benchmarks.sampling_simulation --streams {chosen.streams} --seed {chosen.seed}"
    text = page(run(chosen.streams, chosen.seed), chosen.streams, command)
    show(text)
    if chosen.publish:
        RESULTS.write_text(f"# Sampling and estimates\n\n{text}")
        README.write_text(between_markers(README.read_text(), text, BEGIN, END))


if __name__ == "__main__":
    main(sys.argv[1:])
