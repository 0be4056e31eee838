"""Datasets and their revisions. A revision is immutable: its digest is the SHA-256 of a canonical manifest.

The manifest names examples by content hash, never by row id, so the same judgements give the same digest anywhere.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Select, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store import pii
from services.store.base import uuid7
from services.store.copying import among, copy_rows, land_rows
from services.store.models import Dataset, Example, Project, Revision, RevisionExample, RevisionLeftOut

MANIFEST_FORMAT = 1
LEAST_DIGEST = 8
# Before the hash of an example whose text was erased; manifests go on naming the hash.
ERASED = "erased:"
EXAMPLE_COLUMNS = (
    "id", "project_id", "content_hash", "kind", "source", "split", "group_key", "slice", "messages", "completion",
    "rejected", "interaction_id", "annotation_ids", "reviewers", "pii",
)  # fmt: skip


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
    pii: tuple[str, ...] = ()

    @cached_property
    def content_hash(self) -> str:
        return digest_of(
            {
                "kind": self.kind, "source": self.source, "split": self.split, "slice": self.slice,
                "group_key": self.group_key, "messages": self.messages, "completion": self.completion,
                "rejected": self.rejected, "reviewers": sorted(self.reviewers),
            }
        )  # fmt: skip


class Entry(NamedTuple):
    """An example's line in a manifest, and the row it stands for."""

    example_id: UUID
    content_hash: str
    split: str
    source: str
    slice: str
    reviewers: tuple[str, ...]
    weight: float

    def manifest(self) -> dict[str, Any]:
        return {
            "content_hash": self.content_hash, "split": self.split, "source": self.source, "slice": self.slice,
            "reviewers": list(self.reviewers), "weight": self.weight,
        }  # fmt: skip


class Member(NamedTuple):
    """An example's place in a revision."""

    example: Example
    weight: float


class LeftOut(NamedTuple):
    """What was judged or imported and is not in a revision."""

    interaction_id: UUID | None
    cause: str


class Looks(NamedTuple):
    """How often gates have looked at a held-out part, and the level a promotion handed on to the next look."""

    taken: int
    carry: float


class Diff(NamedTuple):
    """What changed from one revision to another, as manifest entries."""

    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    kept: int


class Located(NamedTuple):
    """A revision with what it belongs to."""

    project: Project
    dataset: Dataset
    revision: Revision


class Rebuilt(NamedTuple):
    """A revision's digests, made again from the rows; `changed` are the examples whose content is not what was hashed.

    The revision is what it says when `digest` is its digest and nothing changed. Of `erased` examples only the hash is
    left to go by.
    """

    digest: str
    held_out_digest: str
    examples: int
    changed: list[UUID]
    erased: int = 0


def canonical(value: object) -> bytes:
    """One spelling per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def treated(draft: Draft, mode: pii.Mode) -> Draft:
    """Personal data marked or masked before anything is hashed or written."""
    if mode == "off":
        return draft
    messages = pii.treat_document(draft.messages, mode)
    completion, rejected = (pii.treat(text or "", mode) for text in (draft.completion, draft.rejected))
    kinds = tuple(sorted({*draft.pii, *messages.kinds, *completion.kinds, *rejected.kinds}))
    if not kinds:
        return draft
    return replace(
        draft,
        messages=messages.value,
        completion=None if draft.completion is None else completion.value,
        rejected=None if draft.rejected is None else rejected.value,
        pii=kinds,
    )


# --- datasets ---------------------------------------------------------------------------------------------


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


# --- making a revision ------------------------------------------------------------------------------------


def add_examples(session: Session, project_id: UUID, drafts: Sequence[Draft]) -> list[Entry]:
    """Rows for the drafts, in their order; a draft whose content is already there gets the existing row."""
    by_hash = {draft.content_hash: draft for draft in drafts}
    rows = (_row(project_id, content_hash, draft) for content_hash, draft in by_hash.items())
    landed = land_rows(session, Example.metadata.tables["example"], EXAMPLE_COLUMNS, rows)
    listed = ", ".join(EXAMPLE_COLUMNS)
    session.execute(text(f"INSERT INTO example ({listed}) SELECT {listed} FROM {landed} ON CONFLICT DO NOTHING"))
    ids = session.execute(
        text(f"SELECT content_hash, e.id FROM example e JOIN {landed} USING (project_id, content_hash)")
    )
    stored: dict[str, UUID] = {row.content_hash: row.id for row in ids}
    return [
        Entry(
            stored[content_hash], content_hash, draft.split, draft.source, draft.slice,
            tuple(sorted(draft.reviewers)), draft.weight,
        )
        for content_hash, draft in by_hash.items()
    ]  # fmt: skip


def _row(project_id: UUID, content_hash: str, draft: Draft) -> tuple[object, ...]:
    return (
        uuid7(), project_id, content_hash, draft.kind, draft.source, draft.split, draft.group_key, draft.slice,
        draft.messages, draft.completion, draft.rejected, draft.interaction_id, list(draft.annotation_ids),
        list(draft.reviewers), list(draft.pii),
    )  # fmt: skip


def create_revision(
    session: Session,
    dataset: Dataset,
    entries: Iterable[Entry],
    report: dict[str, Any],
    left_out: Sequence[LeftOut] = (),
) -> Revision:
    """The revision holding exactly these entries; the existing one when the dataset already had it.

    A new revision starts with its parent's gate looks while most of its held-out part is the parent's.
    """
    ordered = sorted(entries, key=lambda entry: (entry.split, entry.content_hash))
    digest = digest_of(_manifest(ordered))
    session.execute(select(Dataset.id).where(Dataset.id == dataset.id).with_for_update())
    existing = find_revision(session, dataset.id, digest)
    if existing is not None:
        return existing
    parent = latest_revision(session, dataset.id)
    held_out = [entry for entry in ordered if entry.split == "held_out"]
    inherited = _inherited_looks(session, parent, [entry.content_hash for entry in held_out])
    revision = Revision(
        dataset_id=dataset.id,
        digest=digest,
        parent_digest=parent.digest if parent else None,
        train_count=len(ordered) - len(held_out),
        held_out_count=len(held_out),
        held_out_digest=digest_of(_manifest(held_out)),
        report=report,
        looks=inherited.taken,
        look_carry=inherited.carry,
    )
    session.add(revision)
    session.flush()
    _store_members(session, revision.id, ordered, left_out)
    return revision


def _store_members(session: Session, revision_id: UUID, ordered: Sequence[Entry], left_out: Sequence[LeftOut]) -> None:
    tables = Revision.metadata.tables
    copy_rows(
        session,
        tables["revision_example"],
        ("revision_id", "position", "example_id", "content_hash", "split", "weight"),
        (
            (revision_id, position, entry.example_id, entry.content_hash, entry.split, entry.weight)
            for position, entry in enumerate(ordered)
        ),
    )
    copy_rows(
        session,
        tables["revision_left_out"],
        ("revision_id", "position", "interaction_id", "cause"),
        ((revision_id, position, *one) for position, one in enumerate(left_out)),
    )


def _inherited_looks(session: Session, parent: Revision | None, held_out: list[str]) -> Looks:
    """Adding one row must not buy a fresh look budget on a thousand rows already looked at."""
    if parent is None or not held_out:
        return Looks(0, 0.0)
    shared = session.scalar(
        select(func.count()).where(
            RevisionExample.revision_id == parent.id,
            RevisionExample.split == "held_out",
            among(RevisionExample.content_hash, held_out),
        )
    )
    return Looks(parent.looks, parent.look_carry) if 2 * (shared or 0) >= len(held_out) else Looks(0, 0.0)


# --- finding revisions ------------------------------------------------------------------------------------


def find_revision(session: Session, dataset_id: UUID, digest: str) -> Revision | None:
    """By digest, or by a unique beginning of at least 8 characters."""
    if len(digest) < LEAST_DIGEST:
        return None
    matching = select(Revision).where(
        Revision.dataset_id == dataset_id, Revision.digest.startswith(digest, autoescape=True)
    )
    found = session.scalars(matching.limit(2)).all()
    return found[0] if len(found) == 1 else None


def locate(session: Session, digest: str, *, project_id: UUID | None = None) -> Located:
    """A revision by its digest, or a beginning of at least 8 characters, wherever it is; None looks in all projects.

    Where two datasets hold the same revision, the older dataset's. Raises NotFound.
    """
    matching = (
        select(Project, Dataset, Revision)
        .join(Dataset, Dataset.project_id == Project.id)
        .join(Revision, Revision.dataset_id == Dataset.id)
        .where(Revision.digest.startswith(digest, autoescape=True))
        .order_by(Dataset.id)
    )
    if project_id is not None:
        matching = matching.where(Project.id == project_id)
    found = session.execute(matching.limit(50)).all() if len(digest) >= LEAST_DIGEST else []
    if len({row[2].digest for row in found}) != 1:
        many = f"{len(found)} revisions begin" if found else "no revision begins"
        raise NotFound(f"{many} with {digest[:12]!r}; give {LEAST_DIGEST} characters of its digest or more")
    return Located(*found[0])


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


# --- the held-out part ------------------------------------------------------------------------------------


def lock_looks(session: Session, revision_id: UUID) -> Looks:
    """How often gates have looked at the held-out part; nobody else counts until the transaction ends."""
    counted = select(Revision.looks, Revision.look_carry).where(Revision.id == revision_id).with_for_update()
    return Looks(*session.execute(counted).one())


def count_look(session: Session, revision_id: UUID, carry: float = 0.0) -> None:
    """A gate has looked, at the same held-out part in every revision of the dataset that has it; the next look gets
    `carry` on top."""
    revision = session.get_one(Revision, revision_id)
    same = Revision.id == revision_id
    if revision.held_out_digest is not None:
        twins = (Revision.dataset_id == revision.dataset_id) & (Revision.held_out_digest == revision.held_out_digest)
        same = same | twins
    counted = update(Revision).where(same).values(looks=Revision.looks + 1, look_carry=carry)
    session.execute(counted.execution_options(synchronize_session=False))


# --- what is inside ---------------------------------------------------------------------------------------


def members(
    session: Session, revision_id: UUID, split: str | None = None, *, limit: int | None = None, offset: int = 0
) -> list[Member]:
    """Examples with their weights, in manifest order."""
    wanted = _members(revision_id, split).limit(limit).offset(offset)
    return [Member(example, weight) for example, weight in session.execute(wanted)]


def _members(revision_id: UUID, split: str | None = None) -> Select[Example, float]:
    wanted = (
        select(Example, RevisionExample.weight)
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(RevisionExample.revision_id == revision_id)
        .order_by(RevisionExample.position)
    )
    return wanted if split is None else wanted.where(RevisionExample.split == split)


def stream(session: Session, revision_id: UUID, split: str | None = None) -> Iterable[Member]:
    """As `members`, without holding them all."""
    wanted = _members(revision_id, split).execution_options(yield_per=500)
    return (Member(example, weight) for example, weight in session.execute(wanted))


def entries(session: Session, revision_id: UUID) -> list[Entry]:
    """The manifest's lines in order, without the texts."""
    wanted = (
        select(
            Example.id, RevisionExample.content_hash, Example.split, Example.source, Example.slice, Example.reviewers,
            RevisionExample.weight,
        )
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(RevisionExample.revision_id == revision_id)
        .order_by(RevisionExample.position)
    )  # fmt: skip
    return [
        Entry(row.id, row.content_hash, row.split, row.source, row.slice, tuple(sorted(row.reviewers)), row.weight)
        for row in session.execute(wanted)
    ]


def manifest(session: Session, revision_id: UUID) -> dict[str, Any]:
    """What the digest is the SHA-256 of, rebuilt from the rows; `digest_of` it to verify a revision."""
    return _manifest(entries(session, revision_id))


def _manifest(listed: Iterable[Entry]) -> dict[str, Any]:
    return {"format": MANIFEST_FORMAT, "examples": [entry.manifest() for entry in listed]}


def rebuild(session: Session, revision_id: UUID) -> Rebuilt:
    """Hash every text again and the manifest made of the hashes."""
    listed: list[Entry] = []
    changed: list[UUID] = []
    erased = 0
    for example, weight in stream(session, revision_id):
        content_hash = draft_of(example).content_hash
        if example.content_hash.startswith(ERASED):
            erased, content_hash = erased + 1, example.content_hash.removeprefix(ERASED)
        elif content_hash != example.content_hash:
            changed.append(example.id)
        reviewers = tuple(sorted(example.reviewers))
        listed.append(Entry(example.id, content_hash, example.split, example.source, example.slice, reviewers, weight))
        session.expunge(example)
    ordered = sorted(listed, key=lambda entry: (entry.split, entry.content_hash))
    held_out = [entry for entry in ordered if entry.split == "held_out"]
    return Rebuilt(digest_of(_manifest(ordered)), digest_of(_manifest(held_out)), len(ordered), changed, erased)


def draft_of(example: Example) -> Draft:
    """The draft that an example's row was made from."""
    return Draft(
        kind=example.kind,
        source=example.source,
        split=example.split,
        slice=example.slice,
        group_key=example.group_key,
        messages=example.messages,
        completion=example.completion,
        rejected=example.rejected,
        interaction_id=example.interaction_id,
        annotation_ids=tuple(example.annotation_ids),
        reviewers=tuple(example.reviewers),
        pii=tuple(example.pii),
    )


def diff(session: Session, old: Revision, new: Revision) -> Diff:
    """Which manifest entries `new` adds to and removes from `old`."""
    return compare(entries(session, old.id), entries(session, new.id))


def compare(old: Iterable[Entry], new: Iterable[Entry]) -> Diff:
    """Which lines the newer manifest adds to and removes from the older one."""
    before = {entry.content_hash: entry.manifest() for entry in old}
    after = {entry.content_hash: entry.manifest() for entry in new}
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


def left_out(session: Session, revision_id: UUID, cause: str, *, limit: int = 50) -> list[UUID]:
    """Interactions that were left out for a cause."""
    wanted = select(RevisionLeftOut.interaction_id).where(
        RevisionLeftOut.revision_id == revision_id,
        RevisionLeftOut.cause == cause,
        RevisionLeftOut.interaction_id.is_not(None),
    )
    return [one for one in session.scalars(wanted.order_by(RevisionLeftOut.position).limit(limit)) if one is not None]
