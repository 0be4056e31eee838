"""What is to be looked at, and what people judged."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of

VERDICTS = ("accept", "correct", "reject", "prefer", "skip", "escalate", "undo")
PREFERENCES = ("response", "alternative", "tie")
STRATEGIES = ("negative_feedback", "low_confidence", "schema_failure", "disagreement", "novelty", "uniform", "chosen")
BULK_KINDS = ("review", "tag", "withdraw")
BULK_STATES = ("queued", "running", "done", "undoing", "undone", "failed")


class ReviewItem(Base):
    """An interaction waiting for human eyes. One lease at a time; `probability` is π as realised in its stratum.

    `split` is fixed before labelling; held-out items want two distinct reviewers (`overlap_target`). `judged` is kept
    by a trigger on `annotation`, so that no writer can go beyond the target. `alternative` makes the item a pair;
    `gold` holds the known verdict of a hidden check.
    """

    __tablename__ = "review_item"
    __table_args__ = (
        one_of("strategy", *STRATEGIES),
        one_of("split", "train", "held_out"),
        one_of("state", "open", "done", "escalated", "disputed", "withdrawn"),
        CheckConstraint("judged BETWEEN 0 AND overlap_target", name="judged"),
        UniqueConstraint("interaction_id"),
        Index("ix_review_item_queue", "project_id", "state", "priority", "order_hash"),
        Index("ix_review_item_counts", "project_id", "state", "strategy"),
        Index("ix_review_item_held", "lease_user_id", postgresql_where=text("lease_user_id IS NOT NULL")),
        Index("ix_review_item_gold", "project_id", postgresql_where=text("gold IS NOT NULL")),
        Index(None, "project_id", "window"),
        Index(None, "project_id", "created_at"),
        Index(None, "project_id", "done_at"),
    )
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    interaction_id: Mapped[UUID]
    strategy: Mapped[str]
    window: Mapped[str]
    stratum_size: Mapped[int]
    probability: Mapped[float | None]
    priority: Mapped[int]
    order_hash: Mapped[str]
    split: Mapped[str]
    group_key: Mapped[str]
    overlap_target: Mapped[int] = mapped_column(default=1)
    judged: Mapped[int] = mapped_column(default=0, server_default="0")
    alternative: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    gold: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    state: Mapped[str] = mapped_column(default="open")
    lease_user_id: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    lease_token: Mapped[UUID | None]
    lease_expires_at: Mapped[datetime | None]
    created_at: Mapped[Now]
    done_at: Mapped[datetime | None]


class Annotation(Base):
    """One reviewer's judgement. Appended, never overwritten: an undo is a row that supersedes another.

    `checked` ones answered a hidden gold item and count for nothing else; one that `adjudicates` settles a dispute.
    `again` marks what somebody said of an item a second time, as the one lead who was left to decide it.
    """

    __tablename__ = "annotation"
    __table_args__ = (
        one_of("verdict", *VERDICTS),
        one_of("preference", *PREFERENCES),
        CheckConstraint("(verdict = 'prefer') = (preference IS NOT NULL)", name="prefer"),
        CheckConstraint("NOT again OR adjudicates OR verdict = 'skip'", name="again"),
        UniqueConstraint("author_id", "idempotency_key"),
        Index(None, "review_item_id"),
        Index("ix_annotation_author", "author_id", "project_id", "created_at"),
        Index("ix_annotation_decisions", "project_id", "created_at", postgresql_where=text("adjudicates")),
        Index("ix_annotation_supersedes", "supersedes", postgresql_where=text("supersedes IS NOT NULL")),
        Index(None, "project_id", "created_at"),
    )
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id"))
    review_item_id: Mapped[UUID] = mapped_column(ForeignKey("review_item.id"))
    interaction_id: Mapped[UUID]
    author_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"))
    idempotency_key: Mapped[str]
    verdict: Mapped[str]
    correction: Mapped[str | None]
    preference: Mapped[str | None]
    tags: Mapped[list[str]]
    spans: Mapped[list[Any]] = mapped_column(default=list, server_default=text("'[]'"))
    comment: Mapped[str | None]
    assisted: Mapped[bool] = mapped_column(default=False)
    checked: Mapped[bool] = mapped_column(default=False, server_default="false")
    adjudicates: Mapped[bool] = mapped_column(default=False, server_default="false")
    again: Mapped[bool] = mapped_column(default=False, server_default="false")
    active_ms: Mapped[int | None]
    supersedes: Mapped[UUID | None] = mapped_column(ForeignKey("annotation.id"))
    created_at: Mapped[Now]


class SavedView(Base):
    """A search of the interactions list under a name: `query` is its address. Somebody's own, or the project's."""

    __tablename__ = "saved_view"
    __table_args__ = (UniqueConstraint("project_id", "user_id", "name"),)
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"))
    name: Mapped[str]
    query: Mapped[str]
    shared: Mapped[bool] = mapped_column(default=False, server_default="false")
    created_at: Mapped[Now]


class BulkAction(Base):
    """One thing done to many interactions, in batches; `bulk_change` holds what it takes to undo it exactly.

    `selection` is the search it was made from, or the ids; `place` is the last id it has dealt with.
    """

    __tablename__ = "bulk_action"
    __table_args__ = (
        one_of("kind", *BULK_KINDS),
        one_of("state", *BULK_STATES),
        Index(None, "project_id", "created_at"),
    )
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id"))
    kind: Mapped[str]
    params: Mapped[dict[str, Any]]
    selection: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default="queued", server_default="queued")
    expected: Mapped[int]
    seen: Mapped[int] = mapped_column(default=0, server_default="0")
    changed: Mapped[int] = mapped_column(default=0, server_default="0")
    restored: Mapped[int] = mapped_column(default=0, server_default="0")
    kept: Mapped[int] = mapped_column(default=0, server_default="0")
    place: Mapped[UUID | None]
    job_id: Mapped[UUID | None]
    error: Mapped[str | None]
    created_at: Mapped[Now]
    finished_at: Mapped[datetime | None]


class BulkChange(Base):
    """One interaction that a bulk action changed, and what was there before."""

    __tablename__ = "bulk_change"
    action_id: Mapped[UUID] = mapped_column(ForeignKey("bulk_action.id", ondelete="CASCADE"), primary_key=True)
    interaction_id: Mapped[UUID] = mapped_column(primary_key=True)
    before: Mapped[dict[str, Any]]


class ReviewKeys(Base):
    """The keys somebody chose for the review page, where they differ from the usual ones: action to key."""

    __tablename__ = "review_keys"
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"), primary_key=True)
    keys: Mapped[dict[str, Any]]
