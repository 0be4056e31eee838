"""Quality earned: how the weights that went live scored on held-out rows, one after the other, and against the base.

Scores on different held-out parts are not compared: labels make new rows, and rows differ in how hard they are. What
was earned since the base is the paired difference on exactly the rows that both have answered, whichever evaluations
asked them. It is read from the rows the gate decided by, so it flatters a little: what had luck there went live.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from math import sqrt
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Result, func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from services.store import served
from services.store.evaluation_config import BASE_ABILITY
from services.store.models import Artifact, Evaluation, EvaluationRow, Revision
from services.store.quality import Z95, wilson

ERASED = "erased"
LEAST_GROUPS = 30
STEPS_MOST = 16


class Cluster(NamedTuple):
    """The rows of one group: how many, and the sum of their scores or differences."""

    rows: int
    total: float


class Score(NamedTuple):
    """The mean score of held-out rows, with its 95 % interval clustered by group."""

    rate: float
    low: float
    high: float
    rows: int


class Step(NamedTuple):
    """Weights that went live. `score` None: no evaluation says; `base` is the base's on the same part, where known.

    `part` names the held-out part, `metric` what it was scored by: only scores that share both are comparable.
    """

    at: datetime
    generation: int
    digest: str | None
    came_back: bool
    score: Score | None
    base: Score | None
    part: str | None
    metric: str | None
    evaluation_id: UUID | None


class Gain(NamedTuple):
    """The mean difference from the base over the rows both have answered, with its 95 % interval."""

    delta: float
    low: float
    high: float
    rows: int
    groups: int


class Earned(NamedTuple):
    """`steps` oldest first. `gain` is that of what serves now; None with the cause in `why_not`."""

    steps: list[Step]
    gain: Gain | None
    why_not: str


def earned(session: Session, project_id: UUID) -> Earned:
    """Read from the rows of decided evaluations; callers keep the answer for a while."""
    spans = [span for span in served.spans(session, project_id) if span.how == "live"]
    steps = [_step(session, project_id, span) for span in spans[-STEPS_MOST:]]
    if not steps or steps[-1].digest is None:
        return Earned(steps, None, "The base serves: nothing has been earned yet.")
    found = _evaluation_of(session, project_id, steps[-1].digest, steps[-1].at)
    if found is None:
        return Earned(steps, None, "What serves now was never evaluated, so nothing can be said of it.")
    clusters = _against_base(session, found)
    if len(clusters) < LEAST_GROUPS:
        return Earned(steps, None, _too_few(len(clusters)))
    return Earned(steps, difference(clusters), "")


def _too_few(groups: int) -> str:
    if groups == 0:
        return "No held-out row was answered by both the base and what serves now, so nothing can be said."
    named = "1 group" if groups == 1 else f"{groups} groups"
    return (
        f"Only {named} of held-out rows were answered by both the base and what serves now; it takes {LEAST_GROUPS} to "
        "say what was earned."
    )


# --- statistics -------------------------------------------------------------------------------------------


def score(clusters: Sequence[Cluster]) -> Score | None:
    """Wilson's limits at the effective number of rows: rows of one session stand or fall together."""
    rows = sum(one.rows for one in clusters)
    if not rows:
        return None
    mean = sum(one.total for one in clusters) / rows
    unit = 1 / len(clusters)
    if 0 < mean < 1 and len(clusters) > 1:
        unit = max(1 / rows, _variance(clusters, mean, rows) / (mean * (1 - mean)))
    low, high = wilson(mean, unit)
    return Score(mean, max(0.0, low), min(1.0, high), rows)


def difference(clusters: Sequence[Cluster]) -> Gain:
    """A normal interval around the mean difference, one full win and one full loss added (as Agresti–Min do): without
    them a handful of wins among ties would be sure of a gain."""
    rows = sum(one.rows for one in clusters)
    padded = [*clusters, Cluster(1, 1.0), Cluster(1, -1.0)]
    mean = sum(one.total for one in clusters) / (rows + 2)
    half = Z95 * sqrt(_variance(padded, mean, rows + 2))
    delta = sum(one.total for one in clusters) / rows
    return Gain(delta, max(-1.0, min(delta, mean - half)), min(1.0, max(delta, mean + half)), rows, len(clusters))


def _variance(clusters: Iterable[Cluster], mean: float, rows: int) -> float:
    """Of a ratio of sums over groups, by linearisation (Cochran, Sampling Techniques, 6.3)."""
    residuals = [one.total - mean * one.rows for one in clusters]
    groups = len(residuals)
    return groups / (groups - 1) * sum(residual**2 for residual in residuals) / rows**2


# --- rows -------------------------------------------------------------------------------------------------


def _step(session: Session, project_id: UUID, span: served.Span) -> Step:
    found = _evaluation_of(session, project_id, span.digest, span.since)
    own = base = None
    part = metric = None
    if found is not None:
        metric, part = str(found.summary.get("metric", "exact_match")), _part(session, found)
        column = EvaluationRow.candidate_scores if span.digest else EvaluationRow.baseline_scores
        own = score(_clusters(session, found.id, column[metric].as_float()))
        base = own if span.digest is None else _base_score(session, project_id, found, metric)
    return Step(
        span.since, span.generation, span.digest, span.began_by == "roll_back", own, base, part,
        metric, found.id if found else None,
    )  # fmt: skip


def _evaluation_of(session: Session, project_id: UUID, digest: str | None, at: datetime) -> Evaluation | None:
    """The last one before it went live. The base never is a candidate: it is what candidates had to beat."""
    who = Evaluation.candidate_digest == digest if digest else Evaluation.baseline_digest.is_(None)
    wanted = select(Evaluation).where(
        Evaluation.project_id == project_id, Evaluation.decision != "undecided", Evaluation.created_at <= at, who
    )
    return session.scalar(wanted.order_by(Evaluation.id.desc()).limit(1))


def _part(session: Session, evaluation: Evaluation) -> str:
    """The held-out part by its digest; revisions of older releases have none, and are comparable to themselves."""
    revision = session.get_one(Revision, evaluation.revision_id)
    return revision.held_out_digest or revision.digest


def _counted() -> ColumnElement[bool]:
    return (EvaluationRow.slice != BASE_ABILITY) & (EvaluationRow.group_key != ERASED)


def _clusters(session: Session, evaluation_id: UUID, value: ColumnElement[float]) -> list[Cluster]:
    rows = session.execute(
        select(func.count(value), func.sum(value))
        .where(EvaluationRow.evaluation_id == evaluation_id, _counted())
        .group_by(EvaluationRow.group_key)
        .having(func.count(value) > 0)
    )
    return _read(rows)


def _base_score(session: Session, project_id: UUID, evaluation: Evaluation, metric: str) -> Score | None:
    """The base on the same part, from the evaluation that asked it."""
    same = select(Evaluation.id).join(Revision, Revision.id == Evaluation.revision_id).where(
        Evaluation.project_id == project_id,
        Evaluation.baseline_digest.is_(None),
        Evaluation.decision != "undecided",
        Evaluation.summary["metric"].as_string() == metric,
        func.coalesce(Revision.held_out_digest, Revision.digest) == _part(session, evaluation),
        _base_model(session, evaluation),
    )  # fmt: skip
    found = session.scalar(same.order_by(Evaluation.id.desc()).limit(1))
    return score(_clusters(session, found, EvaluationRow.baseline_scores[metric].as_float())) if found else None


def _base_model(session: Session, evaluation: Evaluation) -> ColumnElement[bool]:
    """Another base model under the project is another base: its answers are nothing to compare with."""
    artifact = session.get(Artifact, evaluation.candidate_digest)
    same = select(Artifact.digest).where(Artifact.base_digest == (artifact.base_digest if artifact else ""))
    return Evaluation.candidate_digest.in_(same)


def _against_base(session: Session, evaluation: Evaluation) -> list[Cluster]:
    """Differences on the rows that the base has answered in any evaluation, by group."""
    metric = str(evaluation.summary.get("metric", "exact_match"))
    asked = (
        select(EvaluationRow.example_id, EvaluationRow.baseline_scores[metric].as_float().label("score"))
        .join(Evaluation, Evaluation.id == EvaluationRow.evaluation_id)
        .where(
            Evaluation.project_id == evaluation.project_id, Evaluation.baseline_digest.is_(None),
            Evaluation.decision != "undecided", _base_model(session, evaluation),
        )
        .ext(distinct_on(EvaluationRow.example_id))
        .order_by(EvaluationRow.example_id, EvaluationRow.evaluation_id.desc())
        .subquery()
    )  # fmt: skip
    delta = EvaluationRow.candidate_scores[metric].as_float() - asked.c.score
    rows = session.execute(
        select(func.count(delta), func.sum(delta))
        .join(asked, asked.c.example_id == EvaluationRow.example_id)
        .where(EvaluationRow.evaluation_id == evaluation.id, _counted())
        .group_by(EvaluationRow.group_key)
        .having(func.count(delta) > 0)
    )
    return _read(rows)


def _read(rows: Result[int, float]) -> list[Cluster]:
    return [Cluster(int(count), float(total)) for count, total in rows]
