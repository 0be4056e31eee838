"""Golden data, and what takes effect before any weights learn it."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pgvector.sqlalchemy import Vector
from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of

SOURCES = ("accepted", "corrected", "rejected", "preferred", "imported")
PIN_STATES = ("live", "learned", "withdrawn")


class Example(Base):
    """A training or golden row; a copy, so that the log's retention never reaches it."""

    __tablename__ = "example"
    __table_args__ = (
        one_of("split", "train", "held_out"),
        one_of("kind", "completion", "preference", "unpaired"),
        one_of("source", *SOURCES),
        UniqueConstraint("project_id", "content_hash"),
    )
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    content_hash: Mapped[str]
    kind: Mapped[str]
    source: Mapped[str]
    split: Mapped[str]
    group_key: Mapped[str]
    slice: Mapped[str] = mapped_column(default="target", server_default="target")
    messages: Mapped[list[Any]]
    completion: Mapped[str | None]
    rejected: Mapped[str | None]
    interaction_id: Mapped[UUID | None] = mapped_column(index=True)
    annotation_ids: Mapped[list[Any]]
    reviewers: Mapped[list[Any]]
    # Kinds of personal data found when it was written; masked or not, as the project chose then.
    pii: Mapped[list[str]] = mapped_column(default=list, server_default=text("'{}'"))
    # What the request said beside its messages, of the tools it offered; NULL where it offered none.
    asked: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    created_at: Mapped[Now]


class Dataset(Base):
    """A named set of examples of one project."""

    __tablename__ = "dataset"
    __table_args__ = (UniqueConstraint("project_id", "name"),)
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    name: Mapped[str]
    created_at: Mapped[Now]


class Revision(Base):
    """An immutable state of a dataset. `digest` is the SHA-256 of its canonical manifest, `held_out_digest` that of the
    held-out entries alone (NULL on revisions of older releases); `looks` counts gate looks, `look_carry` is the level
    that a promotion handed on to the next one. Revisions with the same `look_budget` share both; it is the id of the
    first of them, and NULL on that one."""

    __tablename__ = "revision"
    __table_args__ = (UniqueConstraint("dataset_id", "digest"),)
    id: Mapped[Key]
    dataset_id: Mapped[UUID] = mapped_column(ForeignKey("dataset.id", ondelete="CASCADE"))
    digest: Mapped[str]
    parent_digest: Mapped[str | None]
    train_count: Mapped[int]
    held_out_count: Mapped[int]
    held_out_digest: Mapped[str | None]
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)
    looks: Mapped[int] = mapped_column(default=0, server_default="0")
    look_carry: Mapped[float] = mapped_column(default=0.0, server_default="0")
    look_budget: Mapped[UUID | None]
    created_at: Mapped[Now]


class RevisionExample(Base):
    """Membership of an example in a revision, in manifest order."""

    __tablename__ = "revision_example"
    revision_id: Mapped[UUID] = mapped_column(ForeignKey("revision.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    example_id: Mapped[UUID] = mapped_column(ForeignKey("example.id"), index=True)
    content_hash: Mapped[str]
    split: Mapped[str]
    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")


class RevisionLeftOut(Base):
    """What was judged or imported and yet is not in a revision, with the cause in words."""

    __tablename__ = "revision_left_out"
    revision_id: Mapped[UUID] = mapped_column(ForeignKey("revision.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    interaction_id: Mapped[UUID | None] = mapped_column(index=True)
    cause: Mapped[str]


class DatasetImport(Base):
    """A file of examples: first a preview that holds its bytes, then rows of a dataset and no bytes."""

    __tablename__ = "dataset_import"
    __table_args__ = (one_of("state", "preview", "done"), Index(None, "dataset_id", "created_at"))
    id: Mapped[Key]
    dataset_id: Mapped[UUID] = mapped_column(ForeignKey("dataset.id", ondelete="CASCADE"))
    file_name: Mapped[str]
    file_digest: Mapped[str]
    content: Mapped[bytes | None] = mapped_column(LargeBinary)
    state: Mapped[str]
    mapping: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    rows: Mapped[int] = mapped_column(default=0, server_default="0")
    duplicates: Mapped[int] = mapped_column(default=0, server_default="0")
    created_by: Mapped[str]
    created_at: Mapped[Now]


class DatasetImportExample(Base):
    """Which examples an import brought, or found there already."""

    __tablename__ = "dataset_import_example"
    import_id: Mapped[UUID] = mapped_column(ForeignKey("dataset_import.id", ondelete="CASCADE"), primary_key=True)
    example_id: Mapped[UUID] = mapped_column(ForeignKey("example.id", ondelete="CASCADE"), primary_key=True, index=True)


class SplitGroup(Base):
    """The side of a session, user or template: assigned once, before anything of it is labelled."""

    __tablename__ = "split_group"
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"), primary_key=True)
    group_key: Mapped[str] = mapped_column(primary_key=True)
    split: Mapped[str]
    created_at: Mapped[Now]


class PromptCluster(Base):
    """Prompts that nearly repeat one another, by their first: its MinHash, the bands to find it by, and its side."""

    __tablename__ = "prompt_cluster"
    __table_args__ = (
        Index("ix_prompt_cluster_bands", "bands", postgresql_using="gin"), Index(None, "project_id"),
    )  # fmt: skip
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    split: Mapped[str]
    fingerprint: Mapped[int]
    sketch: Mapped[bytes] = mapped_column(LargeBinary)
    bands: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    members: Mapped[int] = mapped_column(default=1, server_default="1")
    created_at: Mapped[Now]


class Pin(Base):
    """An approved answer that serves the identical request. `request_hash` is `pin_key.key_of` of that request.

    `learned`: the weights `learned_digest` give this answer themselves, so nothing is served while they are live. The
    text never changes; another approval is another row.
    """

    __tablename__ = "pin"
    __table_args__ = (
        one_of("state", *PIN_STATES),
        Index(
            "uq_pin_current", "project_id", "request_hash", unique=True,
            postgresql_where=text("state IN ('live', 'learned')"),
        ),
        Index(None, "project_id", "created_at"),
        Index(None, "review_item_id"),
        Index(None, "interaction_id"),
    )  # fmt: skip
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    request_hash: Mapped[str]
    messages: Mapped[list[Any]]
    parameters: Mapped[dict[str, Any]]
    answer: Mapped[str]
    size: Mapped[int]
    state: Mapped[str] = mapped_column(default="live", server_default="live")
    interaction_id: Mapped[UUID]
    review_item_id: Mapped[UUID]
    annotation_ids: Mapped[list[Any]]
    approved_by: Mapped[list[Any]]
    hits: Mapped[int] = mapped_column(default=0, server_default="0")
    last_hit_at: Mapped[datetime | None]
    learned_digest: Mapped[str | None]
    created_at: Mapped[Now]
    withdrawn_at: Mapped[datetime | None]
    withdrawn_by: Mapped[str | None]
    reason: Mapped[str | None]


class ExampleEmbedding(Base):
    """A correction of the train split as a vector of the base model's, so that the gateway can find it.

    Being here means that the judgement stands; `shown` is the user's turn that is compared and placed in prompts.
    """

    __tablename__ = "example_embedding"
    __table_args__ = (Index(None, "project_id"),)
    example_id: Mapped[UUID] = mapped_column(ForeignKey("example.id", ondelete="CASCADE"), primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    base_digest: Mapped[str]
    shown: Mapped[str]
    completion: Mapped[str]
    embedding: Mapped[Any] = mapped_column(Vector())
    created_at: Mapped[Now]
