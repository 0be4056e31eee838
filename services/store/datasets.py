"""Datasets and their revisions. A revision is immutable: its digest is the SHA-256 of a canonical manifest.

The manifest names examples by content hash, never by row id, so the same judgements give the same digest anywhere.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store.base import uuid7
from services.store.models import Dataset, Example, Revision, RevisionExample

MANIFEST_FORMAT = 1
INSERT_ROWS = 500
# Before the hash of an example whose text was erased; manifests go on naming the hash.
ERASED = "erased:"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An example before it has a row. `content_hash` covers everything that training or the gate could see."""

    kind: str
    source: str
    split: str
    slice: str
    group_key: str
    messages: list[dict[str, Any]]
    completion: str | None
    rejected: str | None
    interaction_id: UUID | None
    annotation_ids: tuple[str, ...]
    reviewers: tuple[str, ...]
    weight: float = 1.0

    @property
    def content_hash(self) -> str:
        return digest_of(
            {
                "kind": self.kind, "source": self.source, "split": self.split, "slice": self.slice,
                "group_key": self.group_key, "messages": self.messages, "completion": self.completion,
                "rejected": self.rejected, "reviewers": sorted(self.reviewers),
            }
        )  # fmt: skip


class Member(NamedTuple):
    """An example's place in a revision."""

    example: Example
    weight: float


class Diff(NamedTuple):
    """What changed from one revision to another, as manifest entries."""

    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    kept: int


def canonical(value: object) -> bytes:
    """One spelling per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def get_or_create(session: Session, project_id: UUID, name: str) -> Dataset:
    """The project's dataset of that name; safe when two ask at once."""
    created = insert(Dataset).values(id=uuid7(), project_id=project_id, name=name).on_conflict_do_nothing()
    session.execute(created)
    return get(session, project_id, name)


def get(session: Session, project_id: UUID, name: str) -> Dataset:
    """Raises NotFound."""
    found = session.scalar(select(Dataset).where(Dataset.project_id == project_id, Dataset.name == name))
    if found is None:
        raise NotFound(f"no dataset {name!r} in this project")
    return found


def list_(session: Session, project_id: UUID) -> list[Dataset]:
    """By name."""
    return list(session.scalars(select(Dataset).where(Dataset.project_id == project_id).order_by(Dataset.name)))


def add_examples(session: Session, project_id: UUID, drafts: Sequence[Draft]) -> list[Member]:
    """Rows for the drafts, in their order; a draft whose content is already there gets the existing row."""
    by_hash = {draft.content_hash: draft for draft in drafts}
    rows = [_row(project_id, content_hash, draft) for content_hash, draft in by_hash.items()]
    for start in range(0, len(rows), INSERT_ROWS):
        session.execute(insert(Example).on_conflict_do_nothing(), rows[start : start + INSERT_ROWS])
    mine = select(Example).where(Example.project_id == project_id, Example.content_hash.in_(by_hash))
    stored = {example.content_hash: example for example in session.scalars(mine)}
    return [Member(stored[content_hash], draft.weight) for content_hash, draft in by_hash.items()]


def _row(project_id: UUID, content_hash: str, draft: Draft) -> dict[str, Any]:
    return {
        "id": uuid7(), "project_id": project_id, "content_hash": content_hash, "kind": draft.kind,
        "source": draft.source, "split": draft.split, "group_key": draft.group_key, "slice": draft.slice,
        "messages": draft.messages, "completion": draft.completion, "rejected": draft.rejected,
        "interaction_id": draft.interaction_id, "annotation_ids": list(draft.annotation_ids),
        "reviewers": list(draft.reviewers),
    }  # fmt: skip


def create_revision(session: Session, dataset: Dataset, members: Iterable[Member], report: dict[str, Any]) -> Revision:
    """The revision holding exactly these members; the existing one when the dataset already had it.

    A new revision starts with its parent's gate looks while most of its held-out part is the parent's.
    """
    ordered = sorted(members, key=lambda member: (member.example.split, member.example.content_hash))
    digest = digest_of(_manifest([_entry(member.example, member.weight) for member in ordered]))
    session.execute(select(Dataset.id).where(Dataset.id == dataset.id).with_for_update())
    existing = find_revision(session, dataset.id, digest)
    if existing is not None:
        return existing
    parent = latest_revision(session, dataset.id)
    held_out = [member.example.content_hash for member in ordered if member.example.split == "held_out"]
    revision = Revision(
        dataset_id=dataset.id,
        digest=digest,
        parent_digest=parent.digest if parent else None,
        train_count=len(ordered) - len(held_out),
        held_out_count=len(held_out),
        report=report,
        looks=_inherited_looks(session, parent, held_out),
    )
    session.add(revision)
    session.flush()
    session.add_all(
        RevisionExample(
            revision_id=revision.id,
            position=position,
            example_id=member.example.id,
            content_hash=member.example.content_hash,
            split=member.example.split,
            weight=member.weight,
        )
        for position, member in enumerate(ordered)
    )
    session.flush()
    return revision


def _inherited_looks(session: Session, parent: Revision | None, held_out: list[str]) -> int:
    """Adding one row must not buy a fresh look budget on a thousand rows already looked at."""
    if parent is None or not held_out:
        return 0
    shared = session.scalar(
        select(func.count()).where(
            RevisionExample.revision_id == parent.id,
            RevisionExample.split == "held_out",
            RevisionExample.content_hash.in_(held_out),
        )
    )
    return parent.looks if 2 * (shared or 0) >= len(held_out) else 0


def find_revision(session: Session, dataset_id: UUID, digest: str) -> Revision | None:
    """By digest, or by a unique beginning of at least 8 characters."""
    if len(digest) < 8:
        return None
    matching = select(Revision).where(
        Revision.dataset_id == dataset_id, Revision.digest.startswith(digest, autoescape=True)
    )
    found = session.scalars(matching.limit(2)).all()
    return found[0] if len(found) == 1 else None


def latest_revision(session: Session, dataset_id: UUID) -> Revision | None:
    newest = select(Revision).where(Revision.dataset_id == dataset_id).order_by(Revision.id.desc())
    return session.scalar(newest.limit(1))


def revisions(session: Session, dataset_id: UUID, *, limit: int = 50) -> list[Revision]:
    """Newest first."""
    newest = select(Revision).where(Revision.dataset_id == dataset_id).order_by(Revision.id.desc())
    return list(session.scalars(newest.limit(limit)))


def get_revision(session: Session, revision_id: UUID) -> Revision:
    """Raises NotFound."""
    revision = session.get(Revision, revision_id)
    if revision is None:
        raise NotFound(f"no revision {revision_id}")
    return revision


def lock_looks(session: Session, revision_id: UUID) -> int:
    """How often gates have looked at the held-out part; nobody else counts until the transaction ends."""
    counted = select(Revision.looks).where(Revision.id == revision_id).with_for_update()
    return session.scalars(counted).one()


def members(session: Session, revision_id: UUID, split: str | None = None) -> list[Member]:
    """Examples with their weights, in manifest order."""
    wanted = (
        select(Example, RevisionExample.weight)
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(RevisionExample.revision_id == revision_id)
        .order_by(RevisionExample.position)
    )
    if split is not None:
        wanted = wanted.where(RevisionExample.split == split)
    return [Member(example, weight) for example, weight in session.execute(wanted)]


def manifest(session: Session, revision_id: UUID) -> dict[str, Any]:
    """What the digest is the SHA-256 of, rebuilt from the rows; `digest_of` it to verify a revision."""
    return _manifest([_entry(example, weight) for example, weight in members(session, revision_id)])


def _manifest(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"format": MANIFEST_FORMAT, "examples": entries}


def _entry(example: Example, weight: float) -> dict[str, Any]:
    return {
        "content_hash": example.content_hash.removeprefix(ERASED),
        "split": example.split,
        "source": example.source,
        "slice": example.slice,
        "reviewers": sorted(example.reviewers),
        "weight": weight,
    }


def diff(session: Session, old: Revision, new: Revision) -> Diff:
    """Which manifest entries `new` adds to and removes from `old`."""
    before = {entry["content_hash"]: entry for entry in manifest(session, old.id)["examples"]}
    after = {entry["content_hash"]: entry for entry in manifest(session, new.id)["examples"]}
    added = [entry for key, entry in after.items() if before.get(key) != entry]
    removed = [entry for key, entry in before.items() if after.get(key) != entry]
    return Diff(added, removed, len(after) - len(added))


def counts(session: Session, revision_id: UUID) -> dict[str, dict[str, int]]:
    """Rows per split and source: {"train": {"corrected": 300, …}, "held_out": {…}}."""
    grouped = (
        select(RevisionExample.split, Example.source, func.count())
        .join(Example, Example.id == RevisionExample.example_id)
        .where(RevisionExample.revision_id == revision_id)
        .group_by(RevisionExample.split, Example.source)
    )
    table: dict[str, dict[str, int]] = {"train": {}, "held_out": {}}
    for split, source, count in session.execute(grouped):
        table[split][source] = count
    return table
