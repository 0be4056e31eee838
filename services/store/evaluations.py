"""Evaluations: a candidate against what serves, row by row, and what the gate said."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store import revisions, webhooks
from services.store.models import Evaluation, EvaluationRow, Example, Run


class Row(NamedTuple):
    """One held-out example under both, for the page."""

    row: EvaluationRow
    example: Example


def create(
    session: Session, run: Run, *, revision_id: UUID, candidate_digest: str, baseline_digest: str | None
) -> Evaluation:
    """An undecided evaluation of the run."""
    evaluation = Evaluation(
        project_id=run.project_id,
        run_id=run.id,
        revision_id=revision_id,
        candidate_digest=candidate_digest,
        baseline_digest=baseline_digest,
    )
    session.add(evaluation)
    session.flush()
    return evaluation


def decide(
    session: Session,
    evaluation: Evaluation,
    rows: Sequence[EvaluationRow],
    *,
    decision: Literal["promote", "refuse"],
    reasons: list[str],
    summary: dict[str, Any],
) -> None:
    """Store rows and decision together, and count the look they cost, in one transaction of the caller's."""
    session.add_all(rows)
    evaluation.decision = decision
    evaluation.reasons = reasons
    evaluation.summary = summary
    evaluation.finished_at = datetime.now(UTC)
    revisions.count_look(session, evaluation.revision_id)
    session.flush()
    webhooks.gate_decided(session, evaluation)


def get(session: Session, evaluation_id: UUID) -> Evaluation:
    """Raises NotFound."""
    evaluation = session.get(Evaluation, evaluation_id)
    if evaluation is None:
        raise NotFound(f"no evaluation {evaluation_id}")
    return evaluation


def of_run(session: Session, run_id: UUID) -> Evaluation | None:
    """The run's decided evaluation."""
    decided = select(Evaluation).where(Evaluation.run_id == run_id, Evaluation.decision != "undecided")
    return session.scalar(decided.order_by(Evaluation.id.desc()).limit(1))


def rows(
    session: Session, evaluation_id: UUID, *, outcome: str | None = None, limit: int = 50, offset: int = 0
) -> list[Row]:
    """Rows with their examples; `outcome` is "win", "tie" or "loss" of the candidate on the target metric."""
    evaluation = get(session, evaluation_id)
    wanted = (
        select(EvaluationRow, Example)
        .join(Example, Example.id == EvaluationRow.example_id)
        .where(EvaluationRow.evaluation_id == evaluation_id)
        .order_by(EvaluationRow.example_id)
    )
    if outcome is not None:
        metric = evaluation.summary.get("metric", "exact_match")
        ours = EvaluationRow.candidate_scores[metric].as_float()
        theirs = EvaluationRow.baseline_scores[metric].as_float()
        wanted = wanted.where({"win": ours > theirs, "tie": ours == theirs, "loss": ours < theirs}[outcome])
    return [Row(row, example) for row, example in session.execute(wanted.limit(limit).offset(offset))]
