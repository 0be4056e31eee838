"""Which judgements stand, which of them count, and whether two say the same."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from uuid import UUID

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, aliased

from services.store.models import Annotation, ReviewItem

COUNTED = ("accept", "correct", "reject", "prefer")

Said = tuple[str, str, str]


@cache  # building it costs more than running what it is part of
def unrevoked() -> ColumnElement[bool]:
    """True for annotations that are no undo and have not been undone, answers to hidden checks included."""
    undo = aliased(Annotation)
    undone = select(undo.id).where(undo.supersedes == Annotation.id, undo.verdict == "undo")
    return (Annotation.verdict != "undo") & ~undone.correlate(Annotation).exists()


@cache
def standing() -> ColumnElement[bool]:
    """True for annotations that speak for their item: neither undone nor the answer to a hidden check."""
    return unrevoked() & ~Annotation.checked


def standing_annotations(session: Session, item_id: UUID) -> list[Annotation]:
    """The judgements of an item that stand, oldest first by the database's clock."""
    spoken = select(Annotation).where(Annotation.review_item_id == item_id, standing())
    return list(session.scalars(spoken.order_by(Annotation.created_at, Annotation.id)))


def touched_by(user_id: UUID) -> ColumnElement[bool]:
    """True for review items this person has judged, skipped or escalated and not taken back."""
    mine = select(Annotation.id).where(
        Annotation.review_item_id == ReviewItem.id, Annotation.author_id == user_id, unrevoked()
    )
    return mine.correlate(ReviewItem).exists()


def said(verdict: str, correction: str | None = None, preference: str | None = None) -> Said:
    """A judgement as it is compared with another: what two people typed alike compares alike."""
    return verdict, plain(correction or ""), preference or ""


def said_by(annotation: Annotation) -> Said:
    """What an annotation says."""
    return said(annotation.verdict, annotation.correction, annotation.preference)


def agree(annotations: Sequence[Annotation]) -> bool:
    """Whether all of them say the same."""
    return len({said_by(annotation) for annotation in annotations}) <= 1


def plain(text: str) -> str:
    """One form for what looks the same: composed characters, no trailing blanks."""
    return unicodedata.normalize("NFC", text).rstrip()
