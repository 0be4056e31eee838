"""What an erasure has done so far, in its request's own row: counts by table, namespaces, spans of the log."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.store.models import ErasureRequest, Interaction, Project


def projects(session: Session, made: ErasureRequest) -> list[UUID]:
    """All it may concern: a request for every project names none."""
    if made.project_id is not None:
        return [made.project_id]
    return list(session.scalars(select(Project.id)))


def step(made: ErasureRequest, words: str) -> None:
    """What it is doing now, for the page."""
    made.progress = {**made.progress, "step": words}


def count(made: ErasureRequest, counts: Mapping[str, int]) -> None:
    """Add to the counts by table."""
    total = Counter(made.progress.get("counts", {}))
    total.update({table: number for table, number in counts.items() if number})
    made.progress = {**made.progress, "counts": dict(total)}


def add(made: ErasureRequest, name: str, found: Sequence[Any]) -> None:
    """Add to one of the lists what another attempt has not put there."""
    known = made.progress.get(name, [])
    made.progress = {**made.progress, name: [*known, *(one for one in found if one not in known)]}


def note_traffic(session: Session, made: ErasureRequest, ids: Sequence[UUID]) -> None:
    """Which projects and namespaces they were in, and when: that is how heads that read them are found."""
    rows = session.execute(
        select(
            Interaction.project_id, Interaction.namespace, func.min(Interaction.started_at),
            func.max(Interaction.started_at),
        )
        .where(Interaction.id.in_(ids))
        .group_by(Interaction.project_id, Interaction.namespace)
    ).all()  # fmt: skip
    known = dict(made.progress)
    namespaces = {(project, name) for project, name in known.get("namespaces", [])}
    spans = {project: list(span) for project, span in known.get("spans", {}).items()}
    for project_id, namespace, first, last in rows:
        namespaces.add((str(project_id), namespace))
        begin, end = utc(first), utc(last)
        span = spans.get(str(project_id), [begin, end])
        spans[str(project_id)] = [min(span[0], begin), max(span[1], end)]
    known["namespaces"] = sorted([project, name] for project, name in namespaces)
    known["spans"] = spans
    made.progress = known


def utc(moment: Any) -> str:  # noqa: ANN401 - a datetime, or its text
    """One spelling of a moment, so that texts order as moments do: in UTC, with microseconds."""
    found = moment if isinstance(moment, datetime) else datetime.fromisoformat(moment)
    return found.astimezone(UTC).isoformat(timespec="microseconds")
