"""What the demo shows, computed from the platform's own rows in Postgres."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import sqrt
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from examples.grammars.simulate import APPLICATIONS
from examples.loop.turbo import FINISHED_WELL, Turbo, measure
from services.store import base_ability
from services.store.models import (
    Annotation,
    DeploymentEvent,
    Evaluation,
    EvaluationRow,
    Example,
    Interaction,
    InteractionBody,
    Run,
    RunEvent,
)

SWAP_MARGIN = timedelta(seconds=2)


class Share(NamedTuple):
    """A share with its 95 % Wilson interval; all in 0..1. `rows` 0 gives an interval of everything."""

    share: float
    low: float
    high: float
    rows: int

    def __str__(self) -> str:
        if not self.rows:
            return "no rows"
        return f"{self.share:.1%} ({self.low:.1%} to {self.high:.1%}, n = {self.rows:,})"


def wilson(good: int, count: int) -> Share:
    """Wilson's score interval at 95 % (Wilson 1927), which behaves at 0 and 1."""
    if count == 0:
        return Share(0.0, 0.0, 1.0, 0)
    z = 1.959964
    p = good / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Share(p, max(0.0, middle - half), min(1.0, middle + half), count)


@dataclass(frozen=True, slots=True)
class Served:
    """One logged interaction, as the report needs it. `good` is whether it follows the house rules."""

    started: datetime
    finished: datetime
    adapter: str | None
    good: bool
    ended_well: bool
    gap_ms: float | None


@dataclass(frozen=True, slots=True)
class Gaps:
    """99th percentile over streams of the longest pause between two chunks, in milliseconds; `streams` counts them."""

    p99_ms: float
    streams: int


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run of the loop. `swapped_at` is None when the gate refused."""

    application: str
    decision: str
    reasons: list[str]
    held_out_before: Share
    held_out_after: Share
    traffic_before: Share
    traffic_after: Share
    rows: int
    rows_not_finished_well: int
    gaps_swap: Gaps
    gaps_training: Gaps
    gaps_elsewhere: Gaps
    digest_before: str | None
    digest_after: str | None
    last_correction_at: datetime
    training_started_at: datetime
    training_finished_at: datetime
    swapped_at: datetime | None
    train_examples: int
    corrections: int
    served: list[Served]
    turbo: Turbo

    @property
    def seconds_to_live(self) -> float | None:
        """From the last correction to the flip."""
        return (self.swapped_at - self.last_correction_at).total_seconds() if self.swapped_at else None


def collect(session: Session, run_id: UUID, application: str) -> Report:
    """Read one finished run and the traffic around it. Raises LookupError when the run left no evaluation."""
    run = session.get_one(Run, run_id)
    evaluation = session.scalars(select(Evaluation).where(Evaluation.run_id == run_id)).one_or_none()
    if evaluation is None:
        raise LookupError(f"run {run_id} ended in phase {run.phase!r} without an evaluation: {run.error}")
    served = _served(session, run.project_id, application)
    before, after = _held_out(session, evaluation, application)
    flip = session.scalars(
        select(DeploymentEvent).where(
            DeploymentEvent.project_id == run.project_id, DeploymentEvent.to_digest == evaluation.candidate_digest,
            DeploymentEvent.kind == "flip",
        )
    ).first()  # fmt: skip
    training = _training_span(session, run)
    swap = (flip.at - SWAP_MARGIN, flip.at + SWAP_MARGIN) if flip else None
    return Report(
        application=application,
        decision=evaluation.decision,
        reasons=[str(reason) for reason in evaluation.reasons],
        held_out_before=before,
        held_out_after=after,
        traffic_before=_share([row for row in served if row.adapter is None]),
        traffic_after=_share([row for row in served if row.adapter == evaluation.candidate_digest]),
        rows=len(served),
        rows_not_finished_well=sum(not row.ended_well for row in served),
        gaps_swap=_gaps([row for row in served if swap and _overlaps(row, *swap)]),
        gaps_training=_gaps([row for row in served if _overlaps(row, *training)]),
        gaps_elsewhere=_gaps(
            [row for row in served if not _overlaps(row, *training) and not (swap and _overlaps(row, *swap))]
        ),
        digest_before=flip.from_digest if flip else evaluation.baseline_digest,
        digest_after=flip.to_digest if flip else evaluation.baseline_digest,
        last_correction_at=_last_correction(session, run),
        training_started_at=training[0],
        training_finished_at=training[1],
        swapped_at=flip.at if flip else None,
        served=served,
        turbo=measure(session, run.project_id),
        **_learned_from(session, run),
    )


def _served(session: Session, project_id: UUID, application: str) -> list[Served]:
    rows = session.execute(
        select(
            Interaction.started_at, Interaction.finished_at, Interaction.adapter_digest, Interaction.finish_reason,
            Interaction.longest_gap_ms, InteractionBody.messages, InteractionBody.output,
        )
        .join(InteractionBody, InteractionBody.id == Interaction.id)
        .where(Interaction.project_id == project_id, Interaction.origin == "live")
        .order_by(Interaction.started_at)
    )  # fmt: skip
    house_ok = APPLICATIONS[application].house_ok
    return [
        Served(
            row.started_at, row.finished_at or row.started_at, row.adapter_digest, house_ok(row.messages, row.output),
            row.finish_reason in FINISHED_WELL, row.longest_gap_ms,
        )
        for row in rows
    ]  # fmt: skip


def _held_out(session: Session, evaluation: Evaluation, application: str) -> tuple[Share, Share]:
    """The house-rule score of baseline and candidate on the rows the gate decided from, those of other tasks aside."""
    house_ok = APPLICATIONS[application].house_ok
    rows = session.execute(
        select(EvaluationRow, Example.messages)
        .join(Example, Example.id == EvaluationRow.example_id)
        .where(EvaluationRow.evaluation_id == evaluation.id, EvaluationRow.slice != base_ability.NAME)
    ).all()
    before = sum(house_ok(messages, row.baseline_output) for row, messages in rows)
    after = sum(house_ok(messages, row.candidate_output) for row, messages in rows)
    return wilson(before, len(rows)), wilson(after, len(rows))


def _training_span(session: Session, run: Run) -> tuple[datetime, datetime]:
    times = session.scalars(
        select(RunEvent.at).where(RunEvent.run_id == run.id, RunEvent.kind == "progress", RunEvent.step.is_not(None))
    ).all()
    start = run.started_at or run.created_at
    return (min(times, default=start), max(times, default=start))


def _last_correction(session: Session, run: Run) -> datetime:
    return session.scalars(
        select(Annotation.created_at)
        .where(Annotation.project_id == run.project_id, Annotation.created_at <= run.created_at)
        .order_by(Annotation.created_at.desc())
        .limit(1)
    ).one()


def _learned_from(session: Session, run: Run) -> dict[str, Any]:
    corrections = session.scalars(
        select(Annotation.id).where(Annotation.project_id == run.project_id, Annotation.verdict == "correct")
    ).all()
    report = run.preflight or {}
    return {"corrections": len(corrections), "train_examples": int(report.get("rows_trained", 0))}


def _share(rows: list[Served]) -> Share:
    finished = [row for row in rows if row.ended_well]
    return wilson(sum(row.good for row in finished), len(finished))


def _overlaps(row: Served, start: datetime, end: datetime) -> bool:
    return row.started <= end and row.finished >= start


def _gaps(rows: list[Served]) -> Gaps:
    gaps = [row.gap_ms for row in rows if row.gap_ms is not None]
    return Gaps(float(np.percentile(gaps, 99)) if gaps else float("nan"), len(gaps))
