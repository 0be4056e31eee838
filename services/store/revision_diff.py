"""What changed from one revision to another, and why, row by row."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, exists, func, select
from sqlalchemy.orm import Session, aliased, defer

from services.store import reviews
from services.store.copying import among
from services.store.models import Annotation, Example, Revision, RevisionExample, RevisionLeftOut

Kind = Literal["added", "removed", "changed"]
TEXTS = 200  # of added and of removed rows that come with their texts; the others' are read when asked for
FIELDS = ("kind", "source", "split", "slice", "group_key", "messages", "completion", "rejected", "reviewers")
WORDS = {
    "completion": "the answer", "rejected": "the answer it replaces", "messages": "the prompt", "split": "the split",
    "reviewers": "who reviewed it", "group_key": "the group", "source": "the verdict", "kind": "what it can teach",
    "slice": "the slice",
}  # fmt: skip


class Change(NamedTuple):
    """A row that differs. `before` is None for an added row, `after` for a removed one."""

    kind: Kind
    why: str
    before: Example | None
    after: Example | None


class Sizes(NamedTuple):
    """How many rows a revision adds to and removes from another, and how many both have."""

    added: int
    removed: int
    kept: int


class Explained(NamedTuple):
    """All changes, by kind and cause; the rows both have alike are only counted."""

    changes: list[Change]
    kept: int

    def causes(self) -> dict[str, dict[str, int]]:
        """{"added": {"newly judged": 3}, "removed": {…}, "changed": {…}}, the largest first."""
        table: dict[str, dict[str, int]] = {"added": {}, "removed": {}, "changed": {}}
        for (kind, why), count in Counter((one.kind, one.why) for one in self.changes).most_common():
            table[kind][why] = count
        return table


def explain(session: Session, old: Revision, new: Revision) -> Explained:
    """Every difference with its cause: what was left out of either and why, which judgements were taken back."""
    removed, added = _only_in(session, old, new), _only_in(session, new, old)
    replaced = _paired(removed, added)
    settled = {(before.id, after.id) for before, after in replaced}
    before_ids, after_ids = {pair[0] for pair in settled}, {pair[1] for pair in settled}
    gone = [one for one in removed if one.id not in before_ids]
    come = [one for one in added if one.id not in after_ids]
    _fill(session, [one for pair in replaced for one in pair] + come[:TEXTS] + gone[:TEXTS])
    then, now = _left_out(session, old, come), _left_out(session, new, gone)
    undone = _undone(session, gone)
    changes = [
        *(Change("changed", _fields(before, after), before, after) for before, after in replaced),
        *(Change("added", _why_added(one, then), None, one) for one in come),
        *(Change("removed", _why_removed(one, now, undone), one, None) for one in gone),
    ]
    return Explained(changes, new.train_count + new.held_out_count - len(added))


def sizes(session: Session, old: Revision, new: Revision) -> Sizes:
    """How many rows differ, without looking into them."""
    counted = (
        session.scalar(select(func.count()).select_from(RevisionExample).where(*_unshared(*pair)))
        for pair in ((new, old), (old, new))
    )
    added, removed = (count or 0 for count in counted)
    return Sizes(added, removed, new.train_count + new.held_out_count - added)


def _unshared(one: Revision, other: Revision) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Rows that `one` has and `other` has not, or with another weight."""
    twin = aliased(RevisionExample)
    there = exists().where(
        twin.revision_id == other.id,
        twin.example_id == RevisionExample.example_id,
        twin.weight == RevisionExample.weight,
    )
    return RevisionExample.revision_id == one.id, ~there


def _only_in(session: Session, one: Revision, other: Revision) -> list[Example]:
    """Without their texts, which `_fill` reads for those that need them."""
    wanted = (
        select(Example)
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(*_unshared(one, other))
        .order_by(RevisionExample.position)
        .options(defer(Example.messages), defer(Example.completion), defer(Example.rejected))
    )
    return list(session.scalars(wanted))


def _fill(session: Session, examples: Iterable[Example]) -> None:
    """Read the texts of many rows at once."""
    ids = [one.id for one in examples]
    if ids:
        session.scalars(select(Example).where(among(Example.id, ids)).execution_options(populate_existing=True)).all()


def _paired(removed: Iterable[Example], added: Iterable[Example]) -> list[tuple[Example, Example]]:
    """Rows of the same interaction on both sides are one row that changed."""
    waiting: dict[UUID | None, list[Example]] = defaultdict(list)
    for one in removed:
        waiting[one.interaction_id].append(one)
    return [
        (waiting[one.interaction_id].pop(0), one) for one in added if one.interaction_id and waiting[one.interaction_id]
    ]


def _fields(before: Example, after: Example) -> str:
    differing = [WORDS[name] for name in FIELDS if getattr(before, name) != getattr(after, name)]
    return f"{_listed(differing)} changed" if differing else "its weight changed"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _left_out(session: Session, revision: Revision, examples: list[Example]) -> dict[UUID, str]:
    ids = [one.interaction_id for one in examples if one.interaction_id is not None]
    wanted = select(RevisionLeftOut.interaction_id, RevisionLeftOut.cause).where(
        RevisionLeftOut.revision_id == revision.id, among(RevisionLeftOut.interaction_id, ids)
    )
    return {row.interaction_id: row.cause for row in session.execute(wanted) if row.interaction_id is not None}


def _undone(session: Session, gone: list[Example]) -> set[str]:
    """Those of the rows' judgements that no longer stand."""
    ids = [UUID(str(one)) for example in gone for one in example.annotation_ids]
    standing = select(Annotation.id).where(among(Annotation.id, ids), reviews.standing())
    return {str(one) for one in ids} - {str(one) for one in session.scalars(standing)}


def _why_added(one: Example, then: dict[UUID, str]) -> str:
    if one.source == "imported":
        return "imported"
    before = then.get(one.interaction_id) if one.interaction_id else None
    return f"before: {before}" if before else "newly judged"


def _why_removed(one: Example, now: dict[UUID, str], undone: set[str]) -> str:
    if any(str(judgement) in undone for judgement in one.annotation_ids):
        return "its judgement was taken back"
    after = now.get(one.interaction_id) if one.interaction_id else None
    if after:
        return after
    return "its import was left out" if one.source == "imported" else "no longer judged or held"
