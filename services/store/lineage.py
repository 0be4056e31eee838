"""Where a revision came from and what came of it: interactions by what answered them, imports, runs, adapters."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.store.models import (
    Artifact,
    DatasetImport,
    DatasetImportExample,
    Deployment,
    Example,
    Interaction,
    Revision,
    RevisionExample,
    Run,
)

RUNS_MOST = 6


class Source(NamedTuple):
    """Examples of one origin: answers of some weights (None is the base), or a file."""

    kind: str  # "served", "unlogged" or "imported"
    name: str | None
    examples: int


class Outcome(NamedTuple):
    """A run on the revision, and what it made."""

    run_id: UUID
    kind: str
    state: str
    phase: str
    started: datetime
    artifact_digest: str | None
    artifact_state: str | None
    serves: bool


class Lineage(NamedTuple):
    """Everything one step before and after a revision."""

    sources: list[Source]
    outcomes: list[Outcome]


def trace(session: Session, project_id: UUID, revision: Revision) -> Lineage:
    """Newest runs first, at most RUNS_MOST; largest sources first."""
    sources = [*_served(session, revision.id), *_imported(session, revision.id)]
    return Lineage(sorted(sources, key=lambda one: -one.examples), _outcomes(session, project_id, revision.id))


def _served(session: Session, revision_id: UUID) -> list[Source]:
    logged = Interaction.id.is_not(None)
    counted = (
        select(logged, Interaction.adapter_digest, func.count())
        .select_from(RevisionExample)
        .join(Example, Example.id == RevisionExample.example_id)
        .outerjoin(Interaction, Interaction.id == Example.interaction_id)
        .where(RevisionExample.revision_id == revision_id, Example.source != "imported")
        .group_by(logged, Interaction.adapter_digest)
    )
    return [Source("served" if row[0] else "unlogged", row[1], row[2]) for row in session.execute(counted)]


def _imported(session: Session, revision_id: UUID) -> list[Source]:
    """An example that two files brought counts for the first."""
    first = (
        select(DatasetImportExample.example_id, func.min(DatasetImport.file_name).label("file_name"))
        .join(DatasetImport, DatasetImport.id == DatasetImportExample.import_id)
        .group_by(DatasetImportExample.example_id)
        .subquery()
    )
    counted = (
        select(first.c.file_name, func.count())
        .select_from(RevisionExample)
        .join(first, first.c.example_id == RevisionExample.example_id)
        .join(Example, Example.id == RevisionExample.example_id)
        .where(RevisionExample.revision_id == revision_id, Example.source == "imported")
        .group_by(first.c.file_name)
    )
    return [Source("imported", row[0], row[1]) for row in session.execute(counted)]


def _outcomes(session: Session, project_id: UUID, revision_id: UUID) -> list[Outcome]:
    deployment = session.get(Deployment, project_id)
    serving = deployment.active_digest if deployment else None
    rows = session.execute(
        select(Run, Artifact.state)
        .outerjoin(Artifact, Artifact.digest == Run.artifact_digest)
        .where(Run.revision_id == revision_id)
        .order_by(Run.created_at.desc())
        .limit(RUNS_MOST)
    )
    return [
        Outcome(
            run.id, run.kind, run.state, run.phase, run.created_at, run.artifact_digest, state,
            run.artifact_digest is not None and run.artifact_digest == serving,
        )
        for run, state in rows
    ]  # fmt: skip
