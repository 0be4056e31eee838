"""Evaluations: a candidate against what serves, row by row, and what the gate said."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import deployments, revisions, runs, webhooks
from services.store.evaluation_config import RECORD
from services.store.gate_words import evidence
from services.store.models import Evaluation, EvaluationRow, Example, Revision, Run

LEAST_REASON = 10
LONGEST_REASON = 1000


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
    tested: bool = True,
    carry: float = 0.0,
) -> None:
    """Store rows and decision together, and count the look they cost, in one transaction of the caller's.

    Nothing `tested` costs no look; `carry` is the level that a promotion hands on to the next one.
    """
    session.add_all(rows)
    evaluation.decision = decision
    evaluation.reasons = reasons
    evaluation.summary = summary
    evaluation.finished_at = datetime.now(UTC)
    if tested:
        revisions.count_look(session, evaluation.revision_id, carry)
    session.flush()
    webhooks.gate_decided(session, evaluation)


def get(session: Session, evaluation_id: UUID) -> Evaluation:
    """Raises NotFound."""
    evaluation = session.get(Evaluation, evaluation_id)
    if evaluation is None:
        raise NotFound(f"no evaluation {evaluation_id}")
    return evaluation


def list_(session: Session, project_id: UUID, *, limit: int = 50, offset: int = 0) -> list[Evaluation]:
    """Decided ones, newest first."""
    decided = select(Evaluation).where(Evaluation.project_id == project_id, Evaluation.decision != "undecided")
    return list(session.scalars(decided.order_by(Evaluation.id.desc()).limit(limit).offset(offset)))


def looks_at(session: Session, evaluation: Evaluation) -> list[Evaluation]:
    """Every decided comparison that shares its looks, oldest first."""
    sharing = select(Revision.id).where(revisions.sharing(revisions.budget_of(session, evaluation.revision_id)))
    decided = (
        select(Evaluation)
        .where(Evaluation.revision_id.in_(sharing), Evaluation.decision != "undecided")
        .order_by(Evaluation.id)
    )
    return list(session.scalars(decided))


def of_interaction(session: Session, interaction_id: UUID, *, limit: int = 10) -> list[Evaluation]:
    """Decided evaluations that tested with a copy of an interaction, newest first."""
    tested = (
        select(EvaluationRow.evaluation_id)
        .join(Example, Example.id == EvaluationRow.example_id)
        .where(Example.interaction_id == interaction_id, EvaluationRow.slice != RECORD)
    )
    decided = select(Evaluation).where(Evaluation.id.in_(tested), Evaluation.decision != "undecided")
    return list(session.scalars(decided.order_by(Evaluation.id.desc()).limit(limit)))


def override(session: Session, evaluation: Evaluation, *, actor: str, reason: str) -> Run:
    """Let a refused candidate through: its run goes on to deployment as if it had passed.

    The refusal stays on record beside who overrode it and why. Raises InvalidRequest without a reason, Conflict when
    there is nothing to override: promoted already, overridden already, another run unfinished, or data erased since.
    """
    words = " ".join(reason.split())
    if not LEAST_REASON <= len(words) <= LONGEST_REASON:
        raise InvalidRequest(f"say why, in {LEAST_REASON} to {LONGEST_REASON} characters", param="reason")
    session.refresh(evaluation, with_for_update=True)
    if evaluation.decision != "refuse" or evaluation.run_id is None:
        raise Conflict("only a refusal can be overridden")
    if evaluation.overridden_at is not None:
        raise Conflict(f"{evaluation.overridden_by} has overridden this refusal already")
    run = runs.get(session, evaluation.run_id)
    found = evidence(evaluation)
    deployments.override(session, evaluation.candidate_digest, actor=actor, reason=words, evidence=found)
    evaluation.overridden_at, evaluation.overridden_by, evaluation.override_reason = datetime.now(UTC), actor, words
    payload = {"project_id": str(run.project_id), "digest": evaluation.candidate_digest, "run_id": str(run.id)}
    runs.resume(session, run, "deploying", f"{actor} overrode the gate: {words}")
    runs.hand_over(session, run, "deploy", payload)
    webhooks.gate_decided(session, evaluation)
    return run


def of_run(session: Session, run_id: UUID) -> Evaluation | None:
    """The run's decided evaluation."""
    decided = select(Evaluation).where(Evaluation.run_id == run_id, Evaluation.decision != "undecided")
    return session.scalar(decided.order_by(Evaluation.id.desc()).limit(1))


def of_candidate(session: Session, digest: str) -> Evaluation | None:
    """The last decided evaluation of weights."""
    decided = select(Evaluation).where(Evaluation.candidate_digest == digest, Evaluation.decision != "undecided")
    return session.scalar(decided.order_by(Evaluation.id.desc()).limit(1))


def rows(
    session: Session,
    evaluation_id: UUID,
    *,
    outcome: str | None = None,
    slice_: str | None = None,
    limit: int = 50,
    offset: int = 0,
) -> list[Row]:
    """Rows with their examples; `outcome` is "win", "tie" or "loss" of the candidate on the deciding metric."""
    evaluation = get(session, evaluation_id)
    wanted = (
        select(EvaluationRow, Example)
        .join(Example, Example.id == EvaluationRow.example_id)
        .where(*_chosen(evaluation, outcome, slice_))
        .order_by(EvaluationRow.example_id)
    )
    return [Row(row, example) for row, example in session.execute(wanted.limit(limit).offset(offset))]


def count_rows(session: Session, evaluation: Evaluation, *, outcome: str | None, slice_: str | None) -> int:
    """How many rows `rows` would find."""
    return session.scalar(select(func.count()).where(*_chosen(evaluation, outcome, slice_))) or 0


def _chosen(evaluation: Evaluation, outcome: str | None, slice_: str | None) -> list[ColumnElement[bool]]:
    chosen: list[ColumnElement[bool]] = [EvaluationRow.evaluation_id == evaluation.id, EvaluationRow.slice != RECORD]
    if slice_ is not None:
        chosen.append(EvaluationRow.slice == slice_)
    if outcome is not None:
        metric = evaluation.summary.get("metric", "exact_match")
        ours = EvaluationRow.candidate_scores[metric].as_float()
        theirs = EvaluationRow.baseline_scores[metric].as_float()
        chosen.append({"win": ours > theirs, "tie": ours == theirs, "loss": ours < theirs}[outcome])
    return chosen
