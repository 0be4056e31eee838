"""Revisions of datasets. A revision is immutable: its digest is the SHA-256 of a canonical manifest.

The manifest names examples by content hash, never by row id, so the same judgements give the same digest anywhere.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, select, update
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store.copying import among, copy_rows
from services.store.examples import Entry, digest_of, draft_of, is_erased, plain_hash
from services.store.models import Dataset, Example, Project, Revision, RevisionExample, RevisionLeftOut

MANIFEST_FORMAT = 1
LEAST_DIGEST = 8
_budget = func.coalesce(Revision.look_budget, Revision.id)


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


# --- making one ----------------------------------------------------------------------------------------


def create(
    session: Session,
    dataset: Dataset,
    entries: Iterable[Entry],
    report: dict[str, Any],
    left_out: Sequence[LeftOut] = (),
) -> Revision:
    """The revision holding exactly these entries; the existing one when the dataset already had it.

    A new revision shares the gate looks of the project's most looked-at one that holds at least half of its held-out
    part, whichever data set that belongs to.
    """
    ordered = sorted(entries, key=lambda entry: (entry.split, entry.content_hash))
    digest = digest_of(_manifest(ordered))
    # Two data sets built at once from the same judgements must see each other's held-out part.
    session.execute(select(Project.id).where(Project.id == dataset.project_id).with_for_update(key_share=True))
    existing = find(session, dataset.id, digest)
    if existing is not None:
        return existing
    parent = latest(session, dataset.id)
    held_out = [entry for entry in ordered if entry.split == "held_out"]
    budget = _shared_budget(session, dataset.project_id, [entry.content_hash for entry in held_out])
    shared = Looks(0, 0.0) if budget is None else lock_looks(session, budget)
    revision = Revision(
        dataset_id=dataset.id,
        digest=digest,
        parent_digest=parent.digest if parent else None,
        train_count=len(ordered) - len(held_out),
        held_out_count=len(held_out),
        held_out_digest=digest_of(_manifest(held_out)),
        report=report,
        looks=shared.taken,
        look_carry=shared.carry,
        look_budget=budget,
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


def _shared_budget(session: Session, project_id: UUID, held_out: list[str]) -> UUID | None:
    """Adding one row must not buy a fresh look budget on a thousand rows already looked at, and nor must another name:
    what a project has judged is in the revisions of all its data sets."""
    shared = func.count()
    most = (
        select(_budget)
        .join(Dataset, Dataset.id == Revision.dataset_id)
        .join(RevisionExample, RevisionExample.revision_id == Revision.id)
        .where(
            Dataset.project_id == project_id,
            RevisionExample.split == "held_out",
            among(RevisionExample.content_hash, held_out),
        )
        .group_by(Revision.id)
        .having(2 * shared >= len(held_out))
        .order_by(Revision.looks.desc(), shared.desc(), Revision.id.desc())
    )
    return session.scalar(most.limit(1)) if held_out else None


# --- finding them ----------------------------------------------------------------------------------------


def find(session: Session, dataset_id: UUID, digest: str) -> Revision | None:
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


def latest(session: Session, dataset_id: UUID) -> Revision | None:
    newest = select(Revision).where(Revision.dataset_id == dataset_id).order_by(Revision.id.desc())
    return session.scalar(newest.limit(1))


def list_(session: Session, dataset_id: UUID, *, limit: int = 50) -> list[Revision]:
    """Newest first."""
    newest = select(Revision).where(Revision.dataset_id == dataset_id).order_by(Revision.id.desc())
    return list(session.scalars(newest.limit(limit)))


def get(session: Session, revision_id: UUID) -> Revision:
    """Raises NotFound."""
    revision = session.get(Revision, revision_id)
    if revision is None:
        raise NotFound(f"no revision {revision_id}")
    return revision


# --- the held-out part ------------------------------------------------------------------------------------


def budget_of(session: Session, revision_id: UUID) -> UUID:
    """What revisions that share their looks have in common: the id of the first of them."""
    return session.scalars(select(_budget).where(Revision.id == revision_id)).one()


def sharing(budget: UUID) -> ColumnElement[bool]:
    """The revisions of a look budget."""
    return _budget == budget


def lock_looks(session: Session, revision_id: UUID) -> Looks:
    """How often gates have looked at the held-out part; until the transaction ends nobody else counts, nor begins to
    share the count."""
    first = budget_of(session, revision_id)
    counted = select(Revision.looks, Revision.look_carry).where(Revision.id == first).with_for_update()
    return Looks(*session.execute(counted).one())


def count_look(session: Session, revision_id: UUID, carry: float = 0.0) -> None:
    """A gate has looked, at the rows of every revision that shares the count; the next look gets `carry` on top."""
    mine = sharing(budget_of(session, revision_id))
    counted = update(Revision).where(mine).values(looks=Revision.looks + 1, look_carry=carry)
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
    """Hash every text again and the manifest made of the hashes.

    What the members' own rows say counts as well: who moved a row to the other side there would train on held-out rows.
    """
    listed: list[Entry] = []
    changed: list[UUID] = []
    erased = 0
    for example, member in _streamed(session, revision_id):
        content_hash = draft_of(example).content_hash
        if is_erased(example.content_hash):
            erased, content_hash = erased + 1, plain_hash(example.content_hash)
        if (content_hash, example.split) != (member.content_hash, member.split):
            changed.append(example.id)
        reviewers = tuple(sorted(example.reviewers))
        listed.append(
            Entry(example.id, content_hash, member.split, example.source, example.slice, reviewers, member.weight)
        )
        session.expunge(example)
    ordered = sorted(listed, key=lambda entry: (entry.split, entry.content_hash))
    held_out = [entry for entry in ordered if entry.split == "held_out"]
    return Rebuilt(digest_of(_manifest(ordered)), digest_of(_manifest(held_out)), len(ordered), changed, erased)


def _streamed(session: Session, revision_id: UUID) -> Iterable[tuple[Example, Any]]:
    """Examples beside their places in the revision: hash, split, weight."""
    wanted = (
        select(Example, RevisionExample.content_hash, RevisionExample.split, RevisionExample.weight)
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(RevisionExample.revision_id == revision_id)
        .order_by(RevisionExample.position)
        .execution_options(yield_per=500)
    )
    return ((row[0], row) for row in session.execute(wanted))


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
