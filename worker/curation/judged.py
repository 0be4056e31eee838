"""From judgements that stand to example drafts: who must agree, what becomes of each verdict."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store import interactions, reviews
from services.store.datasets import Draft
from services.store.interactions import Logged
from services.store.models import Annotation, Example, ReviewItem


@dataclass(frozen=True)
class Judged:
    """A review item with the counted judgements that stand, oldest first."""

    item: ReviewItem
    annotations: Sequence[Annotation]

    @property
    def annotation_ids(self) -> tuple[str, ...]:
        return tuple(str(annotation.id) for annotation in self.annotations)

    @property
    def reviewers(self) -> tuple[str, ...]:
        return tuple(sorted({str(annotation.author_id) for annotation in self.annotations}))


class Drafted(NamedTuple):
    """Usable drafts, and how many items were left out for which cause."""

    drafts: list[Draft]
    left_out: Counter[str]


def read(session: Session, project_id: UUID) -> list[Judged]:
    """Every item of the project that has a standing judgement; undone ones are as if never said."""
    rows = session.execute(
        select(ReviewItem, Annotation)
        .join(Annotation, Annotation.review_item_id == ReviewItem.id)
        .where(
            ReviewItem.project_id == project_id,
            ReviewItem.state.in_(("open", "done", "disputed")),
            Annotation.verdict.in_(reviews.COUNTED),
            reviews.standing(),
        )
        .order_by(ReviewItem.interaction_id, Annotation.id)
    )
    grouped: dict[UUID, tuple[ReviewItem, list[Annotation]]] = {}
    for item, annotation in rows:
        grouped.setdefault(item.id, (item, []))[1].append(annotation)
    return [Judged(item, annotations) for item, annotations in grouped.values()]


def draft_all(session: Session, project_id: UUID, judged: Sequence[Judged]) -> Drafted:
    """A draft for every item whose reviewers are enough and agree."""
    logged = interactions.get_many(session, [one.item.interaction_id for one in judged])
    kept = _earlier_examples(session, project_id, judged)
    drafts: list[Draft] = []
    left_out: Counter[str] = Counter()
    for one in judged:
        outcome = _draft(one, logged.get(one.item.interaction_id), kept.get(one.item.interaction_id))
        if isinstance(outcome, Draft):
            drafts.append(outcome)
        else:
            left_out[outcome] += 1
    return Drafted(drafts, left_out)


def _draft(one: Judged, logged: Logged | None, earlier: Example | None) -> Draft | str:
    """The draft, or why there is none."""
    if len(one.reviewers) < one.item.overlap_target:
        return "needs another reviewer"
    if len({_said(annotation) for annotation in one.annotations}) > 1:
        return "reviewers disagree"
    first = one.annotations[0]
    if first.verdict == "reject":
        return "rejected without a correction"
    if logged is None or logged.body is None:
        same = earlier is not None and tuple(earlier.annotation_ids) == one.annotation_ids
        return _from_example(earlier) if earlier is not None and same else "the log no longer holds it"
    if logged.interaction.endpoint != "/v1/chat/completions":
        return "not a chat"
    accepted = first.verdict == "accept"
    if accepted and logged.interaction.finish_reason == "length":
        return "accepted although cut off"
    return Draft(
        kind="completion" if accepted else "preference",
        source="accepted" if accepted else "corrected",
        split=one.item.split,
        # The guard asks: does what was right stay right? The target: does what was wrong become right?
        slice="accepted" if accepted else "target",
        group_key=one.item.group_key,
        messages=logged.body.messages,
        completion=logged.body.output if accepted else _clean(first.correction or ""),
        rejected=None if accepted else logged.body.output,
        interaction_id=one.item.interaction_id,
        annotation_ids=one.annotation_ids,
        reviewers=one.reviewers,
    )


def _said(annotation: Annotation) -> tuple[str, str]:
    return annotation.verdict, _clean(annotation.correction or "")


def _clean(text: str) -> str:
    """What two reviewers typed alike must compare alike, and no model should learn a trailing blank."""
    return unicodedata.normalize("NFC", text).rstrip()


def _earlier_examples(session: Session, project_id: UUID, judged: Sequence[Judged]) -> dict[UUID, Example]:
    """Copies made by earlier builds, for interactions whose body has passed its retention."""
    wanted = select(Example).where(
        Example.project_id == project_id, Example.interaction_id.in_([one.item.interaction_id for one in judged])
    )
    newest = session.scalars(wanted.order_by(Example.id))
    return {example.interaction_id: example for example in newest if example.interaction_id is not None}


def _from_example(example: Example) -> Draft:
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
    )
