"""What people have said about exactly this output to exactly this prompt, so that nothing judges it again."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.store.examples import digest_of
from services.store.models import Annotation, InteractionBody, ReviewItem
from services.store.reviews_standing import standing

# A correction says that a text is not right as it stands, not how wrong it is: the metric compares the two.
VALUES: Mapping[str, float | None] = {"accept": 1.0, "reject": 0.0, "correct": None}
IDS_AT_ONCE = 5000


class Asked(NamedTuple):
    """A prompt, by the digest of its messages, and an output to it."""

    prompt: str
    output: str


class _Said(NamedTuple):
    """One standing judgement of an output."""

    verdict: str
    adjudicates: bool
    id: UUID


def asked(messages: Sequence[Any], output: str) -> Asked:
    """What verdicts are looked up by."""
    return Asked(digest_of(messages), output)


def of_outputs(session: Session, project_id: UUID, wanted: Iterable[Asked]) -> dict[Asked, float]:
    """1 where people accepted the output, 0 where they rejected it; nothing where they disagree, corrected it or never
    saw it. Adjudications win. Settled items of the held-out side only: what is evaluated is there, near repeats too."""
    sought = set(wanted)
    hashes = sorted({_md5(one.output) for one in sought if "\x00" not in one.output})
    said: dict[Asked, list[_Said]] = {}
    for start in range(0, len(hashes), IDS_AT_ONCE):
        for messages, output, *judgement in _judged(session, project_id, hashes[start : start + IDS_AT_ONCE]):
            key = asked(messages, output)
            if key in sought:
                said.setdefault(key, []).append(_Said(*judgement))
    decided = {key: _decided(judgements) for key, judgements in said.items()}
    return {key: value for key, value in decided.items() if value is not None}


def _judged(session: Session, project_id: UUID, hashes: Sequence[str]) -> Iterable[Any]:
    """Judgements of outputs with these hashes; comparisons of two answers say nothing about one alone."""
    return session.execute(
        select(
            InteractionBody.messages, InteractionBody.output, Annotation.verdict, Annotation.adjudicates, Annotation.id
        )
        .join(ReviewItem, ReviewItem.interaction_id == InteractionBody.id)
        .join(Annotation, Annotation.review_item_id == ReviewItem.id)
        .where(
            ReviewItem.project_id == project_id,
            ReviewItem.split == "held_out",
            ReviewItem.state == "done",
            ReviewItem.alternative.is_(None),
            Annotation.verdict.in_(list(VALUES)),
            standing(),
            func.md5(InteractionBody.output).in_(hashes),
        )
    )


def _decided(judgements: Sequence[_Said]) -> float | None:
    adjudicated = [one for one in judgements if one.adjudicates]
    if adjudicated:
        return VALUES[max(adjudicated, key=lambda one: one.id).verdict]
    values = {VALUES[one.verdict] for one in judgements}
    return values.pop() if len(values) == 1 else None


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
