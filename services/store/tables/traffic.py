"""What was served, and what people said of it."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import FetchedValue, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB, TSVECTOR
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
ORIGINS = ("live", "pinned", "cached", "shadow", "evaluation")


class Interaction(Base):
    """One logged prompt and response, narrow. `id` is a UUIDv7, the partition key and the idempotency key."""

    __tablename__ = "interaction"
    __table_args__ = (
        one_of("origin", *ORIGINS),
        one_of("endpoint", *ENDPOINTS),
        Index(None, "project_id", text("id DESC")),
        Index("ix_interaction_end_user", "project_id", "end_user", "id", postgresql_where=text("end_user IS NOT NULL")),
        Index(
            "ix_interaction_session", "project_id", "session_key", "id",
            postgresql_where=text("session_key IS NOT NULL"),
        ),
        {"postgresql_partition_by": "RANGE (id)"},
    )  # fmt: skip
    id: Mapped[Key]
    project_id: Mapped[UUID]
    api_key_id: Mapped[UUID | None]
    origin: Mapped[str]
    arm: Mapped[str] = mapped_column(default="active", server_default="active")
    adapter_digest: Mapped[str | None]
    speculator_digest: Mapped[str | None]
    base_digest: Mapped[str]
    generation: Mapped[int]
    namespace: Mapped[str]
    endpoint: Mapped[str]
    stream: Mapped[bool]
    finish_reason: Mapped[str]
    error: Mapped[str | None]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    drafted_tokens: Mapped[int]
    accepted_tokens: Mapped[int]
    # False: served without drafting, as one of the sampled baseline.
    speculated: Mapped[bool] = mapped_column(default=True, server_default="true")
    # Steps, and per drafter what was tried and accepted at each position; NULL when nothing was drafted.
    speculation: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    ttft_ms: Mapped[float | None]
    latency_ms: Mapped[float | None]
    longest_gap_ms: Mapped[float | None]
    mean_logprob: Mapped[float | None]
    min_logprob: Mapped[float | None]
    session_key: Mapped[str | None]
    end_user: Mapped[str | None]
    group_key: Mapped[str]
    tags: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    config_hash: Mapped[str]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class InteractionBody(Base):
    """The wide half of an interaction, with its own retention.

    A trigger fills in `document`, which full-text search reads, and `project_id` where the writer leaves it out.
    """

    __tablename__ = "interaction_body"
    __table_args__ = (
        Index("ix_interaction_body_document", "document", postgresql_using="gin"),
        {"postgresql_partition_by": "RANGE (id)"},
    )
    id: Mapped[Key]
    project_id: Mapped[UUID | None]
    messages: Mapped[list[Any]]
    parameters: Mapped[dict[str, Any]]
    output: Mapped[str]
    prompt_token_ids: Mapped[list[Any]]
    token_ids: Mapped[list[Any]]
    token_logprobs: Mapped[list[Any]]
    prompt_hash: Mapped[str]
    template_hash: Mapped[str]
    tokenizer_hash: Mapped[str]
    retrieved: Mapped[list[Any]] = mapped_column(default=list, server_default=text("'[]'"))
    worked_examples: Mapped[list[Any]] = mapped_column(default=list, server_default=text("'[]'"))
    spool_version: Mapped[int]
    document: Mapped[str | None] = mapped_column(TSVECTOR, FetchedValue(), deferred=True)


class InteractionEmbedding(Base):
    """The vector of one answer and its prompt, of length 1; `model` says which weights and pooling made it.

    Kept for a project's newest live answers only, so that an exact scan of them stays fast.
    """

    __tablename__ = "interaction_embedding"
    __table_args__ = (Index(None, "project_id", "id"),)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    model: Mapped[str]
    vector: Mapped[Any] = mapped_column(HALFVEC())


class Feedback(Base):
    """What an app or end user says about an interaction. Accepted before the interaction has landed."""

    __tablename__ = "feedback"
    __table_args__ = (UniqueConstraint("project_id", "idempotency_key"), Index(None, "interaction_id"))
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    interaction_id: Mapped[UUID]
    idempotency_key: Mapped[str]
    rating: Mapped[int | None]
    score: Mapped[float | None]
    comment: Mapped[str | None]
    correction: Mapped[str | None]
    author: Mapped[str | None]
    created_at: Mapped[Now]
