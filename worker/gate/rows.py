"""From answers to the rows a decision is made from: every score, and where the deciding one came from."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.store import verdicts
from services.store.evaluation_answers import Answer
from services.store.evaluation_config import BASE_ABILITY, RECORD
from services.store.models import EvaluationRow, Example
from services.store.refusals import refuses
from worker.gate import judge as judges
from worker.gate.decide import ScoredRow
from worker.gate.metrics import Said, Wanted, similarity
from worker.gate.order import Order

# Metrics that are a verdict themselves, right or wrong, so that a person's verdict can stand in their place. On a
# graded one it would tilt the comparison: people have seen what served far more often than the candidate's answers.
VERDICTS = ("exact_match", "judge")
CHECK = "check:"


class Side(NamedTuple):
    """One side's answer to an example. `likelihood` is that of the golden text, where it was asked for."""

    answer: Answer
    likelihood: float | None = None


class Compared(NamedTuple):
    """An example with both answers, and what the judge said where there is one."""

    example: Example
    baseline: Side
    candidate: Side
    judged: str | None = None


def make_rows(order: Order, compared: Sequence[Compared], human: Mapping[verdicts.Asked, float]) -> list[EvaluationRow]:
    """A row for every example."""
    return [_general(order, one) if order.slice_of(one.example) == BASE_ABILITY else _own(order, one, human)
            for one in compared]  # fmt: skip


def scored(rows: Sequence[EvaluationRow], metric: str) -> list[ScoredRow]:
    """The gate's table."""
    return [
        ScoredRow(row.slice, row.group_key, row.baseline_scores[metric], row.candidate_scores[metric])
        for row in rows
        if row.slice != RECORD
    ]


def recorded(example: Example, answer: Answer) -> EvaluationRow:
    """A row that is compared with nothing: only what the candidate said."""
    return EvaluationRow(
        example_id=example.id, slice=RECORD, group_key=example.group_key, baseline_output="",
        candidate_output=answer.output, baseline_scores={}, candidate_scores={},
        details={"candidate": _detail(answer, RECORD)},
    )  # fmt: skip


def asked_of(compared: Sequence[Compared]) -> list[verdicts.Asked]:
    """What people may have judged already."""
    return [
        verdicts.asked(one.example.messages, side.answer.output)
        for one in compared
        for side in (one.baseline, one.candidate)
    ]


def judged_by(human: Mapping[verdicts.Asked, float], one: Compared) -> tuple[float | None, float | None]:
    """People's verdicts on baseline and candidate."""
    baseline, candidate = (human.get(asked) for asked in asked_of([one]))
    return baseline, candidate


def _own(order: Order, one: Compared, human: Mapping[verdicts.Asked, float]) -> EvaluationRow:
    by_judge = judges.scores_of(one.judged) if one.judged is not None else (None, None)
    wanted = Wanted(one.example.completion or "", order.schema, order.checks)
    sides = (one.baseline, one.candidate)
    scores = [_scores(order, side, wanted, judged) for side, judged in zip(sides, by_judge, strict=True)]
    sources = _let_people_decide(order.deciding, scores, judged_by(human, one))
    return _row(order, one, scores, sources)


def _scores(order: Order, side: Side, wanted: Wanted, judged: float | None) -> dict[str, float]:
    said = Said(side.answer.output, side.likelihood, judged)
    by_check = {f"{CHECK}{check.name}": float(check.passes(said.text)) for check in order.checks}
    return {name: metric(said, wanted) for name, metric in order.metrics.items()} | by_check


def _let_people_decide(
    deciding: str, scores: Sequence[dict[str, float]], said: tuple[float | None, float | None]
) -> list[str]:
    """Put verdicts in the place of the deciding score and say so. A judge compares, so both sides must have one."""
    usable = deciding in VERDICTS and (deciding != "judge" or None not in said)
    sources = []
    for side, verdict in zip(scores, said, strict=True):
        if usable and verdict is not None:
            side[deciding] = verdict
        sources.append("people" if usable and verdict is not None else deciding)
    return sources


def _general(order: Order, one: Compared) -> EvaluationRow:
    """General ability is how much of the good answer is still there, whatever the project's own task is scored by."""
    golden = one.example.completion or ""
    scores = [{order.deciding: similarity(side.answer.output, golden)} for side in (one.baseline, one.candidate)]
    return _row(order, one, scores, ["similarity", "similarity"])


def _row(order: Order, one: Compared, scores: Sequence[dict[str, float]], sources: Sequence[str]) -> EvaluationRow:
    sides = (one.baseline.answer, one.candidate.answer)
    baseline, candidate = (_detail(answer, source) for answer, source in zip(sides, sources, strict=True))
    details = {"baseline": baseline, "candidate": candidate}
    return EvaluationRow(
        example_id=one.example.id,
        slice=order.slice_of(one.example),
        group_key=one.example.group_key,
        baseline_output=one.baseline.answer.output,
        candidate_output=one.candidate.answer.output,
        baseline_scores=scores[0],
        candidate_scores=scores[1],
        details=details if one.judged is None else details | {"judge": one.judged},
    )


def _detail(answer: Answer, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "finish": answer.finish_reason,
        "tokens": answer.tokens,
        "refused": refuses(answer.output),
    }
