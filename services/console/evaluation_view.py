"""An evaluation as its page shows it: the decision in words, slices as a forest plot, metrics, looks, rows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from services.console import charts
from services.store import evaluations, power
from services.store.evaluation_config import BASE_ABILITY, TARGET
from services.store.gate_words import headline, verdict
from services.store.models import Artifact, Dataset, Evaluation, EvaluationRow, Revision, Run

SLICES = {
    TARGET: "what was corrected",
    "accepted": "what was right already",
    BASE_ABILITY: "general prompts, by similarity",
}
METRICS = {
    "exact_match": "Exact match",
    "json_valid": "Valid JSON",
    "schema_valid": "Keeps the schema",
    "field_f1": "Field F1",
    "similarity": "Similarity",
    "likelihood": "Likelihood of the correction",
    "checks": "All checks",
    "judge": "Preferred by the judge",
}
PAGE = 20
PLOT_WIDTH = 260


class SliceLine(NamedTuple):
    """A slice of the forest plot: shares, not percentages. `verdict` is what its interval says, `bar` in pixels."""

    name: str
    meaning: str
    figures: Mapping[str, Any]
    bar: charts.Interval
    margin: float | None
    verdict: str
    wanted: int | None


class Plot(NamedTuple):
    """Slices on one scale."""

    width: int
    zero: float
    ticks: list[charts.Tick]
    lines: list[SliceLine]


class MetricLine(NamedTuple):
    """A metric's means on the project's own rows."""

    name: str
    baseline: float
    candidate: float
    decides: bool


class RowLine(NamedTuple):
    """One held-out example under both, as the list shows it."""

    row: EvaluationRow
    prompt: Sequence[Mapping[str, Any]]
    wanted: str
    outcome: str
    scores: tuple[float | None, float | None]
    sources: tuple[str, str]
    judge: str | None


class Chosen(NamedTuple):
    """Which rows are shown: outcome and slice, empty for all, and the page from 0."""

    outcome: str = ""
    slice: str = ""
    start: int = 0


def describe(session: Session, evaluation: Evaluation, chosen: Chosen) -> dict[str, Any]:
    """Everything the page's templates use."""
    revision = session.get(Revision, evaluation.revision_id)
    summary = evaluation.summary
    total = evaluations.count_rows(session, evaluation, outcome=chosen.outcome or None, slice_=chosen.slice or None)
    return {
        "evaluation": evaluation,
        "headline": headline(evaluation),
        "summary": summary,
        "run": session.get(Run, evaluation.run_id) if evaluation.run_id else None,
        "artifact": session.get(Artifact, evaluation.candidate_digest),
        "revision": revision,
        "dataset": session.get(Dataset, revision.dataset_id) if revision else None,
        "plot": slices_plot(summary),
        "metrics": metric_lines(summary),
        "metric": metric_name(str(summary.get("metric", "exact_match"))),
        "looks": evaluations.looks_at(session, evaluation),
        "next_level": next_level(evaluation, revision),
        "outcomes": outcomes(summary),
        "rows": row_lines(session, evaluation, chosen),
        "rows_total": total,
        "page_size": PAGE,
        "chosen": chosen,
    }


def slices_plot(summary: Mapping[str, Any]) -> Plot:
    """The target first, then the guarded slices by name."""
    slices: dict[str, dict[str, Any]] = summary.get("slices") or {}
    ordered = sorted(slices.items(), key=lambda pair: (pair[0] != TARGET, pair[0]))
    margins = [row.get("margin") for _, row in ordered]
    lowest = max((margin for margin in margins if margin is not None), default=None)
    drawn = charts.forest(
        [(row["delta"], row["low"], row["high"]) for _, row in ordered],
        PLOT_WIDTH,
        None if lowest is None else -lowest,
    )
    scale = _scale(drawn, lowest)
    wanted = summary.get("wanted") or {}
    lines = [
        SliceLine(
            name, SLICES.get(name, ""), row, bar, None if row.get("margin") is None else scale(-row["margin"]),
            verdict(name, row), wanted.get(name),
        )
        for (name, row), bar in zip(ordered, drawn.rows, strict=True)
    ]  # fmt: skip
    return Plot(drawn.width, drawn.zero, drawn.ticks, lines)


def _scale(drawn: charts.Forest, lowest: float | None) -> Any:  # noqa: ANN401 - a function from a difference to a pixel
    """Where another difference is on the plot, from where zero and the lowest margin are."""
    if not lowest or drawn.margin is None:
        return lambda _difference: drawn.zero
    unit = (drawn.zero - drawn.margin) / lowest
    return lambda difference: round(drawn.zero + difference * unit, 1)


def metric_lines(summary: Mapping[str, Any]) -> list[MetricLine]:
    """The deciding metric first, as the project named them."""
    deciding = summary.get("metric")
    means: Mapping[str, Mapping[str, float]] = summary.get("means") or {}
    ordered = sorted(means.items(), key=lambda pair: pair[0] != deciding)
    return [
        MetricLine(metric_name(name), pair["baseline"], pair["candidate"], name == deciding) for name, pair in ordered
    ]


def metric_name(name: str) -> str:
    """A metric in words; a check by the name its project gave it."""
    return METRICS.get(name, name.removeprefix("check:").capitalize())


def outcomes(summary: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows the candidate won, tied and lost."""
    slices = (summary.get("slices") or {}).values()
    wins, ties, losses = (sum(row[name] for row in slices) for name in ("wins", "ties", "losses"))
    return wins, ties, losses


def next_level(evaluation: Evaluation, revision: Revision | None) -> float | None:
    """What the next look at this held-out part may spend."""
    if revision is None or not evaluation.summary.get("alpha"):
        return None
    return power.level(revision.looks + 1, revision.look_carry)


def row_lines(session: Session, evaluation: Evaluation, chosen: Chosen) -> list[RowLine]:
    """One page of rows."""
    found = evaluations.rows(
        session, evaluation.id, outcome=chosen.outcome or None, slice_=chosen.slice or None,
        limit=PAGE, offset=chosen.start,
    )  # fmt: skip
    metric = str(evaluation.summary.get("metric", "exact_match"))
    return [_line(pair, metric) for pair in found]


def _line(pair: evaluations.Row, metric: str) -> RowLine:
    row, details = pair.row, pair.row.details or {}
    theirs, ours = row.baseline_scores.get(metric), row.candidate_scores.get(metric)
    sources = tuple(str(details.get(side, {}).get("source", metric)) for side in ("baseline", "candidate"))
    return RowLine(
        row, pair.example.messages, pair.example.completion or "", outcome(theirs, ours), (theirs, ours),
        (sources[0], sources[1]), details.get("judge"),
    )  # fmt: skip


def outcome(theirs: float | None, ours: float | None) -> str:
    """ "win", "tie" or "loss" of the candidate."""
    before, after = theirs or 0.0, ours or 0.0
    return "win" if after > before else "loss" if after < before else "tie"


def target_line(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The target slice's figures, for the list."""
    found: Mapping[str, Any] | None = (summary.get("slices") or {}).get(TARGET)
    return found
