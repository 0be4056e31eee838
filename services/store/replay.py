"""Older examples mixed into a run, so that what an adapter could do is not forgotten; which ones is kept by the run.

They come from the train parts of revisions that earlier adapters learned before they went live, and of the revision
before this one, or from a data set that the run names. What the run's own revision holds needs no replay.
"""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, delete, exists, func, insert, select
from sqlalchemy.orm import Session

from services.store import datasets, examples, revisions
from services.store.models import Artifact, Example, Revision, RevisionExample, Run, RunExample

SERVED = ("live", "retired", "rolled_back")
REVISIONS_MOST = 10


class Replayed(NamedTuple):
    """A run, and an older example that it was given again."""

    run: Run
    example_id: UUID


def pool(session: Session, run: Run, dataset: str, *, limit: int) -> list[Example]:
    """Up to `limit` examples that may be replayed, in an order fixed by the run's revision. Raises NotFound for a data
    set that is not there."""
    revisions = _named(session, run.project_id, dataset) if dataset else _learned(session, run)
    if run.revision_id is None or not revisions:
        return []
    older = exists().where(
        RevisionExample.example_id == Example.id, RevisionExample.revision_id.in_(revisions),
        RevisionExample.split == "train",
    )  # fmt: skip
    ours = exists().where(RevisionExample.example_id == Example.id, RevisionExample.revision_id == run.revision_id)
    order = func.md5(func.concat(Example.content_hash, str(run.revision_id)))
    wanted = select(Example).where(
        Example.project_id == run.project_id, older, ~ours, *_allowed(run.revision_id), _teaching(run.kind)
    )
    return list(session.scalars(wanted.order_by(order).limit(limit)))


def _allowed(revision_id: UUID) -> list[ColumnElement[bool]]:
    """Neither erased nor of a group that this revision holds out. Near-duplicates share their side of the split."""
    held_out = (
        select(Example.group_key)
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(RevisionExample.revision_id == revision_id, RevisionExample.split == "held_out")
    )
    return [
        Example.split == "train",
        ~Example.content_hash.startswith(examples.ERASED),
        Example.group_key.not_in(held_out),
    ]


def _teaching(kind: str) -> ColumnElement[bool]:
    """What has something to say to a run of this kind: the trainer's rows, in SQL."""
    good, bad = Example.completion.is_not(None), Example.rejected.is_not(None)
    if kind == "dpo":
        return good & bad
    only_better = (Example.source == "preferred") | ((Example.source == "imported") & (Example.kind == "preference"))
    return ~only_better & ((good | bad) if kind == "kto" else good)


def _named(session: Session, project_id: UUID, name: str) -> list[UUID]:
    newest = revisions.latest(session, datasets.get(session, project_id, name).id)
    return [newest.id] if newest else []


def _learned(session: Session, run: Run) -> list[UUID]:
    served = (
        select(Run.revision_id)
        .join(Artifact, Artifact.digest == Run.artifact_digest)
        .where(Run.project_id == run.project_id, Artifact.state.in_(SERVED), Run.revision_id.is_not(None))
        .order_by(Run.created_at.desc())
        .limit(REVISIONS_MOST)
    )
    found = [one for one in session.scalars(served) if one is not None]
    ours = session.get(Revision, run.revision_id) if run.revision_id else None
    if ours is not None and ours.parent_digest is not None:
        parent = revisions.find(session, ours.dataset_id, ours.parent_digest)
        found += [parent.id] if parent else []
    return sorted(set(found) - {run.revision_id}, key=str)


def keep(session: Session, run_id: UUID, examples: Sequence[Example]) -> None:
    """These are what the run replays from now on."""
    session.execute(delete(RunExample).where(RunExample.run_id == run_id))
    if examples:
        session.execute(insert(RunExample), [{"run_id": run_id, "example_id": one.id} for one in examples])


def replaying(session: Session, project_id: UUID, interaction_id: UUID) -> list[Replayed]:
    """Runs that were given an example of the interaction again, oldest first."""
    drawn = (
        select(Run, RunExample.example_id)
        .join(RunExample, RunExample.run_id == Run.id)
        .join(Example, Example.id == RunExample.example_id)
        .where(Run.project_id == project_id, Example.interaction_id == interaction_id)
        .order_by(Run.id, Example.id)
    )
    return [Replayed(*row) for row in session.execute(drawn)]


def kept(session: Session, run_id: UUID) -> list[Example]:
    """What the run replays, without what was erased since; every attempt gets it in the same order, or no checkpoint of
    an earlier one would fit."""
    drawn = (
        select(Example)
        .join(RunExample, RunExample.example_id == Example.id)
        .where(RunExample.run_id == run_id, ~Example.content_hash.startswith(examples.ERASED))
        .order_by(Example.content_hash)
    )
    return list(session.scalars(drawn))
