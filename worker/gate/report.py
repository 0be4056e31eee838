"""What an evaluation tells beside its decision: means, lengths, refusals, the judge's worth, where scores came from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from services.store import verdicts
from services.store.evaluation_config import BASE_ABILITY, RECORD
from services.store.held_out import cause
from services.store.models import EvaluationRow
from worker.gate.decide import Decision
from worker.gate.judge import Agreement, Outcome, agreement
from worker.gate.order import Order
from worker.gate.rows import Compared, judged_by

UNKNOWN = "nothing says whether general ability stays"
SIDES = ("baseline", "candidate")
CONSISTENT: Mapping[str | None, Outcome] = {"win": "win", "tie": "tie", "loss": "loss"}


def summarise(
    order: Order, rows: Sequence[EvaluationRow], decision: Decision, judged: Agreement | None
) -> dict[str, Any]:
    """The decision's figures, and what is told beside them, over the project's own rows."""
    rows = [row for row in rows if row.slice != RECORD]
    own = [row for row in rows if row.slice != BASE_ABILITY]
    return {
        "metric": order.deciding,
        "rows": len(rows),
        "means": _means(own),
        "sources": {side: dict(Counter(row.details[side]["source"] for row in own)) for side in SIDES},
        "answers": {side: _answers([row.details[side] for row in own]) for side in SIDES} if own else {},
        "judge": _judge(order, own, judged),
        "general_left_out": {"own_task": order.own_task, "trained": order.trained},
        **decision.summary(),
    }


def told(order: Order, decision: Decision) -> list[str]:
    """The decision's reasons, and beside them what the general prompts or, with too little to test, the queue say."""
    if decision.tested:
        return [*decision.reasons, *about_general(order)]
    held_up = cause(order.waits)
    return [*decision.reasons, held_up] if held_up else decision.reasons


def about_general(order: Order) -> list[str]:
    """What there is to say of the general prompts beside their interval: none, or not all."""
    left_out = [
        f"{count:,} {why}"
        for count, why in ((order.own_task, "are of the project’s own task"), (order.trained, "were trained on"))
        if count
    ]
    every = len(order.general) + order.own_task + order.trained
    if not every:
        return [f"{UNKNOWN}: the project has no {BASE_ABILITY} set to score by (import a dataset of that name)"]
    if not order.general:
        return [f"{UNKNOWN}: of the {every:,} rows of {BASE_ABILITY} {' and '.join(left_out)}"]
    if order.trained:
        return [
            f"{order.trained:,} of the {every:,} rows of {BASE_ABILITY} are left out, as the run was trained on them"
        ]
    return []


def _means(rows: Sequence[EvaluationRow]) -> dict[str, dict[str, float]]:
    names = rows[0].baseline_scores if rows else ()
    return {
        name: {
            "baseline": fmean(row.baseline_scores[name] for row in rows),
            "candidate": fmean(row.candidate_scores[name] for row in rows),
        }
        for name in names
    }


def _answers(details: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Shares of the answers that were cut off, refused or missing, and their mean length in tokens."""
    return {
        "tokens": fmean(one["tokens"] for one in details),
        "cut_off": fmean(one["finish"] == "length" for one in details),
        "failed": fmean(one["finish"] == "error" for one in details),
        "refused": fmean(one["refused"] for one in details),
    }


def _judge(order: Order, rows: Sequence[EvaluationRow], judged: Agreement | None) -> dict[str, Any] | None:
    if order.judging is None:
        return None
    outcomes = Counter(row.details["judge"] for row in rows if "judge" in row.details)
    told = None if judged is None else judged._asdict()
    return {"model": order.judging.config.model, "outcomes": dict(outcomes), "agreement": told}


def judge_agreement(compared: Sequence[Compared], human: Mapping[verdicts.Asked, float]) -> Agreement:
    """On the rows where people judged both of two different outputs and the judge said something."""
    told: list[tuple[Outcome, Outcome]] = []
    for one in compared:
        baseline, candidate = judged_by(human, one)
        if one.judged in CONSISTENT and baseline is not None and candidate is not None:
            person: Outcome = "win" if candidate > baseline else "loss" if candidate < baseline else "tie"
            told.append((person, CONSISTENT[one.judged]))
    return agreement(told)
