"""One artefact: what taught it, who judged it, where it answered, who took it away, and what taints it."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Exists, func, select
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store import pages, served
from services.store.models import (
    Artifact,
    AuditEvent,
    Dataset,
    Evaluation,
    Example,
    Interaction,
    Revision,
    RevisionExample,
    Run,
    RunExample,
)

EVENTS_MOST = 50


class About(NamedTuple):
    """An artefact and everything one step before and after it. Speculators are trained on the log: no revision.

    `replayed` counts the older examples that its run was given beside the revision's.
    """

    artifact: Artifact
    run: Run | None
    revision: Revision | None
    dataset: Dataset | None
    replayed: int
    evaluations: list[Evaluation]
    spans: list[served.Span]
    taken: list[AuditEvent]


class Answered(NamedTuple):
    """Requests an artefact answered: by origin, how many failed, and when the first and last began."""

    by_origin: dict[str, int]
    failed: int
    first: datetime | None
    last: datetime | None


class Lesson(NamedTuple):
    """An example that an artefact was trained on, and whether its interaction is still in the log.

    `weight` is the revision's; what was replayed is not in it and has none.
    """

    example: Example
    weight: float | None
    logged: bool
    replayed: bool = False


def about(session: Session, project_id: UUID, digest: str) -> About:
    """Raises NotFound for what is not this project's."""
    artifact = session.get(Artifact, digest)
    if artifact is None or artifact.project_id != project_id:
        raise NotFound(f"this project has no artefact {digest[:12]}")
    run = session.get(Run, artifact.run_id) if artifact.run_id else None
    revision = session.get(Revision, run.revision_id) if run and run.revision_id else None
    return About(
        artifact=artifact,
        run=run,
        revision=revision,
        dataset=session.get(Dataset, revision.dataset_id) if revision else None,
        replayed=_replayed(session, run) if run else 0,
        evaluations=_evaluations(session, project_id, digest),
        spans=[span for span in reversed(served.spans(session, project_id)) if span.digest == digest],
        taken=_taken(session, digest),
    )


def _replayed(session: Session, run: Run) -> int:
    return session.scalar(select(func.count()).where(RunExample.run_id == run.id)) or 0


def _evaluations(session: Session, project_id: UUID, digest: str) -> list[Evaluation]:
    """As a candidate, and as what a candidate had to beat."""
    wanted = select(Evaluation).where(
        Evaluation.project_id == project_id,
        Evaluation.decision != "undecided",
        (Evaluation.candidate_digest == digest) | (Evaluation.baseline_digest == digest),
    )
    return list(session.scalars(wanted.order_by(Evaluation.id.desc()).limit(EVENTS_MOST)))


def _taken(session: Session, digest: str) -> list[AuditEvent]:
    """Exports, as the audit log has them."""
    wanted = select(AuditEvent).where(AuditEvent.subject == f"artifact:{digest}")
    return list(session.scalars(wanted.order_by(AuditEvent.id.desc()).limit(EVENTS_MOST)))


def answered(session: Session, artifact: Artifact) -> Answered:
    """From every row of the log since the artefact was made: callers keep the answer for a while."""
    column = Interaction.adapter_digest if artifact.kind == "adapter" else Interaction.speculator_digest
    rows = session.execute(
        select(
            Interaction.origin, func.count(), func.count().filter(Interaction.finish_reason == "error"),
            func.min(Interaction.started_at), func.max(Interaction.started_at),
        )
        .where(
            Interaction.project_id == artifact.project_id,
            Interaction.id >= pages.first_id(artifact.created_at),
            column == artifact.digest,
        )
        .group_by(Interaction.origin)
    ).all()  # fmt: skip
    counts = {origin: count for origin, count, *_ in rows}
    firsts, lasts = [row[3] for row in rows], [row[4] for row in rows]
    return Answered(counts, sum(row[2] for row in rows), min(firsts, default=None), max(lasts, default=None))


def lessons(session: Session, about: About, *, limit: int, offset: int) -> Sequence[Lesson]:
    """The rows it was trained on: the revision's in its order, then those replayed."""
    if about.run is None or about.revision is None:
        return []
    own = _own(session, about.revision, limit=limit, offset=offset)
    rest, passed = limit - len(own), max(0, offset - about.revision.train_count)
    return [*own, *(_older(session, about.run, limit=rest, offset=passed) if rest and about.replayed else [])]


def _own(session: Session, revision: Revision, *, limit: int, offset: int) -> list[Lesson]:
    rows = session.execute(
        select(Example, RevisionExample.weight, _logged())
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(RevisionExample.revision_id == revision.id, RevisionExample.split == "train")
        .order_by(RevisionExample.position)
        .limit(limit)
        .offset(offset)
    )
    return [Lesson(*row) for row in rows]


def _older(session: Session, run: Run, *, limit: int, offset: int) -> list[Lesson]:
    rows = session.execute(
        select(Example, _logged())
        .join(RunExample, RunExample.example_id == Example.id)
        .where(RunExample.run_id == run.id)
        .order_by(Example.id)
        .limit(limit)
        .offset(offset)
    )
    return [Lesson(example, None, logged, replayed=True) for example, logged in rows]


def _logged() -> Exists:
    return select(Interaction.id).where(Interaction.id == Example.interaction_id).exists()
