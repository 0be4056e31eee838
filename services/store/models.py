"""Every table. No foreign key points at `interaction`: partitions of it are dropped whole, so examples copy bodies."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pgvector.sqlalchemy import HALFVEC, Vector
from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    FetchedValue,
    ForeignKey,
    Index,
    LargeBinary,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TSVECTOR
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of, uuid7

ROLES = ("viewer", "reviewer", "lead", "operator", "admin")
SCOPES = ("infer", "feedback", "review", "train", "admin")
SIGN_IN_METHODS = ("link", "invitation", "oidc")
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
ORIGINS = ("live", "pinned", "cached", "shadow", "evaluation")
VERDICTS = ("accept", "correct", "reject", "prefer", "skip", "escalate", "undo")
PREFERENCES = ("response", "alternative", "tie")
STRATEGIES = ("negative_feedback", "low_confidence", "schema_failure", "disagreement", "novelty", "uniform", "chosen")
BULK_KINDS = ("review", "tag", "withdraw")
BULK_STATES = ("queued", "running", "done", "undoing", "undone", "failed")
SOURCES = ("accepted", "corrected", "rejected", "preferred", "imported")
JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled", "dead")
RUN_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
PIN_STATES = ("live", "learned", "withdrawn")
ERASURE_KINDS = ("end_user", "session")
DELIVERY_STATES = ("pending", "delivered", "given_up", "cancelled")
ARTIFACT_STATES = (
    "built", "verified", "staged", "shadow", "canary", "live", "retired", "rejected", "quarantined", "rolled_back",
)  # fmt: skip
ROLLOUT_STAGES = (
    "shadow", "canary", "promoted", "rolled_back", "rejected", "quarantined", "stopped", "superseded",
)  # fmt: skip

event.listen(Base.metadata, "before_create", DDL("CREATE EXTENSION IF NOT EXISTS vector"))  # type: ignore[no-untyped-call]


# --- people and keys --------------------------------------------------------------------------------------


class Project(Base):
    """One application or tenant. `slug` is the `model` name apps send; `config` holds tags, guidelines, margins."""

    __tablename__ = "project"
    id: Mapped[Key]
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    config: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    created_at: Mapped[Now]


class ApiKey(Base):
    """`prefix` is the public 8-character id in `wh_<id>_<secret>`; only HMAC-SHA256(pepper, key) is kept.

    `project_id` NULL means every project. `user_id` is whom the scope review acts as. A rotated key has one successor,
    whose `rotated_from` names it, and lives on until it expires.
    """

    __tablename__ = "api_key"
    __table_args__ = (Index(None, "project_id"), UniqueConstraint("rotated_from"))
    id: Mapped[Key]
    prefix: Mapped[str] = mapped_column(unique=True)
    hash: Mapped[bytes] = mapped_column(LargeBinary)
    name: Mapped[str]
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    scopes: Mapped[list[str]]
    created_at: Mapped[Now]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    user_id: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    created_by: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    rotated_from: Mapped[UUID | None] = mapped_column(ForeignKey("api_key.id"))


class UserAccount(Base):
    """A person. The row is never deleted, so that judgements stay attributed; a deleted person's row keeps no name and
    no address (`services.store.departure`)."""

    __tablename__ = "user_account"
    id: Mapped[Key]
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    disabled_at: Mapped[datetime | None]
    created_at: Mapped[Now]
    deleted_at: Mapped[datetime | None]


class Membership(Base):
    """A person's role. `project_id` NULL means on every project."""

    __tablename__ = "membership"
    __table_args__ = (
        one_of("role", *ROLES),
        UniqueConstraint("user_id", "project_id", postgresql_nulls_not_distinct=True),
    )
    id: Mapped[Key]
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"))
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    role: Mapped[str]


class SignInLink(Base):
    """A one-time sign-in link; only the hash of its token is kept."""

    __tablename__ = "sign_in_link"
    token_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"))
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class Invitation(Base):
    """A one-time link that makes an account with a role. `project_id` NULL means on every project.

    `invited_by_key` made it where no person did. The address lives here and in the account only, so that it can be
    erased.
    """

    __tablename__ = "invitation"
    __table_args__ = (one_of("role", *ROLES), Index(None, "email"))
    id: Mapped[Key]
    token_hash: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    email: Mapped[str]
    name: Mapped[str]
    role: Mapped[str]
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    invited_by: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    invited_by_key: Mapped[UUID | None] = mapped_column(ForeignKey("api_key.id", ondelete="CASCADE"))
    created_at: Mapped[Now]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    accepted_at: Mapped[datetime | None]
    user_id: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))


class UserIdentity(Base):
    """Who an OIDC provider says a person is: `subject` is the provider's own name for them and never reused."""

    __tablename__ = "user_identity"
    __table_args__ = (UniqueConstraint("user_id", "issuer"),)
    issuer: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"))
    created_at: Mapped[Now]


class LoginSession(Base):
    """A browser session; opaque cookie, hashed here. `id` is what pages and the API call it, `method` how it began."""

    __tablename__ = "session"
    __table_args__ = (one_of("method", *SIGN_IN_METHODS),)
    token_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[Now]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    id: Mapped[UUID] = mapped_column(unique=True, server_default=text("gen_random_uuid()"))
    method: Mapped[str] = mapped_column(default="link", server_default="link")
    device: Mapped[str] = mapped_column(default="", server_default="")
    last_seen_at: Mapped[datetime | None]


# --- what was served --------------------------------------------------------------------------------------


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


# --- review -----------------------------------------------------------------------------------------------


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


# --- golden data ------------------------------------------------------------------------------------------


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
    that a promotion handed on to the next one."""

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


# --- immediate effect --------------------------------------------------------------------------------------


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


# --- learning ---------------------------------------------------------------------------------------------


class Artifact(Base):
    """Adapter or speculator; immutable; `digest` is the SHA-256 of its manifest.json and its directory's name."""

    __tablename__ = "artifact"
    __table_args__ = (one_of("kind", "adapter", "speculator"), one_of("state", *ARTIFACT_STATES))
    digest: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id"), index=True)
    run_id: Mapped[UUID | None] = mapped_column(ForeignKey("run.id", use_alter=True))
    base_digest: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default="built")
    # Trained on what has been erased since: it may serve on where it serves, and is deployed nowhere any more.
    tainted_at: Mapped[datetime | None]
    created_at: Mapped[Now]


class Run(Base):
    """A training run: from revision to a decision. `phase` is what it is doing now, in words for the page."""

    __tablename__ = "run"
    __table_args__ = (
        one_of("kind", "sft", "dpo", "kto", "speculator"),
        one_of("state", *RUN_STATES),
        # Never two unfinished runs of one project, its speculator's counted apart.
        Index(
            "uq_run_unfinished", "project_id", text("(kind = 'speculator')"), unique=True,
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
        Index(None, "project_id", "created_at"),
    )  # fmt: skip
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id"))
    kind: Mapped[str]
    state: Mapped[str] = mapped_column(default="queued")
    phase: Mapped[str] = mapped_column(default="queued")
    params: Mapped[dict[str, Any]]
    dataset_id: Mapped[UUID | None] = mapped_column(ForeignKey("dataset.id"))
    revision_id: Mapped[UUID | None] = mapped_column(ForeignKey("revision.id"))
    artifact_digest: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    job_id: Mapped[UUID | None]
    preflight: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    error: Mapped[str | None]
    created_by: Mapped[str]
    created_at: Mapped[Now]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class RunExample(Base):
    """An example that a run trained on besides its revision's: replayed, against forgetting."""

    __tablename__ = "run_example"
    __table_args__ = (Index(None, "example_id"),)
    run_id: Mapped[UUID] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    example_id: Mapped[UUID] = mapped_column(ForeignKey("example.id", ondelete="CASCADE"), primary_key=True)


class RunEvent(Base):
    """What a run reports while it works: `progress` rows (step, loss, lr, tokens/s …), phases, log lines."""

    __tablename__ = "run_event"
    __table_args__ = (Index(None, "run_id", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"))
    at: Mapped[Now]
    kind: Mapped[str]
    step: Mapped[int | None]
    payload: Mapped[dict[str, Any]]


class Evaluation(Base):
    """A candidate against a baseline on a revision's held-out rows, and what the gate said.

    A refusal that a person overrode stays a refusal; `overridden_by` says who let the candidate through, and why.
    """

    __tablename__ = "evaluation"
    __table_args__ = (one_of("decision", "promote", "refuse", "undecided"), Index(None, "project_id", "created_at"))
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id"))
    run_id: Mapped[UUID | None] = mapped_column(ForeignKey("run.id"), index=True)
    revision_id: Mapped[UUID] = mapped_column(ForeignKey("revision.id"))
    candidate_digest: Mapped[str]
    baseline_digest: Mapped[str | None]
    decision: Mapped[str] = mapped_column(default="undecided")
    reasons: Mapped[list[Any]] = mapped_column(default=list)
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[Now]
    finished_at: Mapped[datetime | None]
    overridden_at: Mapped[datetime | None]
    overridden_by: Mapped[str | None]
    override_reason: Mapped[str | None]


class EvaluationRow(Base):
    """One held-out example under both: the rows a decision was made from.

    `details` holds, for baseline and candidate, where the deciding score came from and what the answer was like.
    """

    __tablename__ = "evaluation_row"
    evaluation_id: Mapped[UUID] = mapped_column(ForeignKey("evaluation.id", ondelete="CASCADE"), primary_key=True)
    example_id: Mapped[UUID] = mapped_column(ForeignKey("example.id"), primary_key=True)
    slice: Mapped[str]
    group_key: Mapped[str]
    baseline_output: Mapped[str]
    candidate_output: Mapped[str]
    baseline_scores: Mapped[dict[str, Any]]
    candidate_scores: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict, server_default=text("'{}'"))


class EvaluationAnswer(Base):
    """What named weights answered to one request about an example: kept so that nobody asks the same twice.

    `weights` names base, adapter and how they are computed; `request_hash` covers the prompt's tokens and the sampling.
    `likelihood` is of a given text instead, where that was asked.
    """

    __tablename__ = "evaluation_answer"
    __table_args__ = (Index(None, "project_id"),)
    example_id: Mapped[UUID] = mapped_column(ForeignKey("example.id", ondelete="CASCADE"), primary_key=True)
    weights: Mapped[str] = mapped_column(primary_key=True)
    request_hash: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    output: Mapped[str]
    finish_reason: Mapped[str]
    tokens: Mapped[int]
    likelihood: Mapped[float | None]
    created_at: Mapped[Now]


class Deployment(Base):
    """Which digests a project serves now; changed by compare-and-set on `generation`.

    NULL active is the base; NULL speculator is the suffix drafter, which needs no artefact.
    """

    __tablename__ = "deployment"
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"), primary_key=True)
    generation: Mapped[int] = mapped_column(default=1)
    active_digest: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    canary_digest: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    canary_share: Mapped[float] = mapped_column(default=0.0, server_default="0")
    last_good_digest: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    speculator_digest: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    speculator_canary_digest: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    speculator_share: Mapped[float] = mapped_column(default=0.0, server_default="0")
    speculator_last_good_digest: Mapped[str | None] = mapped_column(ForeignKey("artifact.digest"))
    frozen: Mapped[bool] = mapped_column(default=False, server_default="false")
    # Since somebody last looked, or a promotion last went through; so many freeze promotion.
    automatic_rollbacks: Mapped[int] = mapped_column(default=0, server_default="0")
    # What went live is unconfirmed until an engine has said that it serves it; past this moment it is rolled back.
    probe_until: Mapped[datetime | None]
    updated_at: Mapped[Now]


class DeploymentEvent(Base):
    """The deployment's history, one row a transition, with its evidence."""

    __tablename__ = "deployment_event"
    __table_args__ = (Index(None, "project_id", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    at: Mapped[Now]
    kind: Mapped[str]
    generation: Mapped[int]
    from_digest: Mapped[str | None]
    to_digest: Mapped[str | None]
    actor: Mapped[str]
    reason: Mapped[str]
    evidence: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))


# --- telling others ---------------------------------------------------------------------------------------


class Webhook(Base):
    """An address that is told of a project's events. Its secret is derived from the pepper, `id` and `rotation`, so
    nothing here lets anybody sign; since `rotated_at` the one before is on its way out.

    `given_up` counts deliveries given up in a row. `disabled_reason` says why nothing is sent any more.
    """

    __tablename__ = "webhook"
    __table_args__ = (Index(None, "project_id"),)
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    url: Mapped[str]
    events: Mapped[list[str]]
    rotation: Mapped[int] = mapped_column(default=1, server_default="1")
    rotated_at: Mapped[datetime | None]
    given_up: Mapped[int] = mapped_column(default=0, server_default="0")
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    created_by: Mapped[str]
    created_at: Mapped[Now]


class WebhookDelivery(Base):
    """One event on its way to one webhook, written in the transaction of what happened. `id` is what receivers tell
    repeats by; `payload` is what was true then, ids and decisions only."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        one_of("state", *DELIVERY_STATES),
        Index(None, "webhook_id", "created_at"),
        Index("ix_webhook_delivery_pending", "created_at", postgresql_where=text("state = 'pending'")),
    )
    id: Mapped[Key]
    webhook_id: Mapped[UUID] = mapped_column(ForeignKey("webhook.id", ondelete="CASCADE"))
    event: Mapped[str]
    payload: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default="pending", server_default="pending")
    attempts: Mapped[int] = mapped_column(default=0, server_default="0")
    status: Mapped[int | None]
    error: Mapped[str | None]
    took_ms: Mapped[float | None]
    job_id: Mapped[UUID | None]
    next_at: Mapped[datetime | None]
    created_at: Mapped[Now]
    delivered_at: Mapped[datetime | None]


class Rollout(Base):
    """One candidate's way to traffic: shadow, canary, and how it ended. At most one of a project is under way.

    `config` is what it began with, `generation` the deployment's while it is a canary, `salt` what users are drawn
    with, `reference` the limits read from what served before. `folded_until` is how far answers are counted, `verdict`
    the last look and `track` the looks before, thinned out: any dispatcher goes on from here.
    """

    __tablename__ = "rollout"
    __table_args__ = (
        one_of("stage", *ROLLOUT_STAGES),
        Index(
            "uq_rollout_open", "project_id", unique=True, postgresql_where=text("stage IN ('shadow', 'canary')"),
        ),
        Index(None, "project_id", "id"),
    )  # fmt: skip
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    digest: Mapped[str] = mapped_column(ForeignKey("artifact.digest"))
    baseline_digest: Mapped[str | None]
    run_id: Mapped[UUID | None] = mapped_column(ForeignKey("run.id"))
    stage: Mapped[str]
    generation: Mapped[int]
    share: Mapped[float] = mapped_column(default=0.0, server_default="0")
    salt: Mapped[str]
    config: Mapped[dict[str, Any]]
    reference: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    verdict: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    track: Mapped[list[Any]] = mapped_column(default=list, server_default=text("'[]'"))
    created_at: Mapped[Now]
    canary_at: Mapped[datetime | None]
    folded_until: Mapped[datetime | None]
    looked_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    ending: Mapped[str | None]


class RolloutCount(Base):
    """What one user's requests add up to on one metric of a canary. `unit` is a salted hash of the user.

    Rows go when the canary ends: only its sums are kept, in `rollout.verdict`.
    """

    __tablename__ = "rollout_count"
    rollout_id: Mapped[UUID] = mapped_column(ForeignKey("rollout.id", ondelete="CASCADE"), primary_key=True)
    metric: Mapped[str] = mapped_column(primary_key=True)
    arm: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(primary_key=True)
    n: Mapped[int]
    total: Mapped[float]


class ShadowAnswer(Base):
    """A logged prompt answered again by a candidate: `shadow_id` is the interaction that holds what it said.

    `live` and `candidate` are figures of the two answers side by side; no text is kept here.
    """

    __tablename__ = "shadow_answer"
    rollout_id: Mapped[UUID] = mapped_column(ForeignKey("rollout.id", ondelete="CASCADE"), primary_key=True)
    interaction_id: Mapped[UUID] = mapped_column(primary_key=True, index=True)
    shadow_id: Mapped[UUID]
    differs: Mapped[bool]
    live: Mapped[dict[str, Any]]
    candidate: Mapped[dict[str, Any]]
    created_at: Mapped[Now]


class EngineReport(Base):
    """What one engine last said of one project: the generation it has everything loaded for, and what is loaded."""

    __tablename__ = "engine_report"
    engine: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"), primary_key=True)
    epoch: Mapped[str]
    generation: Mapped[int]
    digests: Mapped[list[str]]
    seen_at: Mapped[Now]
    changed_at: Mapped[Now]


# --- the ledger -------------------------------------------------------------------------------------------


class Job(Base):
    """The truth about background work. Effects commit only `WHERE fence = mine`; Redis merely rings the bell."""

    __tablename__ = "job"
    __table_args__ = (
        one_of("state", *JOB_STATES),
        Index("ix_job_claim", "queue", "state", "priority", "not_before"),
        Index(
            "uq_job_unfinished_dedupe_key", "dedupe_key", unique=True,
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
    )  # fmt: skip
    id: Mapped[Key]
    kind: Mapped[str]
    queue: Mapped[str] = mapped_column(default="cpu")
    payload: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default="queued")
    priority: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=3)
    fence: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    dedupe_key: Mapped[str | None]
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    error: Mapped[str | None]
    log_tail: Mapped[str | None]
    not_before: Mapped[Now]
    published_at: Mapped[datetime | None]
    lease_expires_at: Mapped[datetime | None]
    created_at: Mapped[Now]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class AuditEvent(Base):
    """Append-only; `hash` = SHA-256(previous hash, canonical row), so a removed or edited row shows.

    Redaction may take personal data out of a row (`redacted_at`); a later row of the chain vouches for it.
    """

    __tablename__ = "audit_event"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[dict[str, Any]]
    previous_hash: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    redacted_at: Mapped[datetime | None]


class ErasureRequest(Base):
    """A request to erase an end user or session, and its certificate. It covers what was asked before `created_at`.

    `subject` is the name until the erasure is done, then `erasure.hashed` of it: enough to know late traffic by.
    `spool_clean_at` is the shipper's word that no spool holds the subject any more; `late_rows` counts answers that
    came to land after that and did not. `forgotten_at`: when the engine forgot, so that corpora are filled again.
    """

    __tablename__ = "erasure_request"
    __table_args__ = (one_of("kind", *ERASURE_KINDS),)
    id: Mapped[Key] = mapped_column(default=uuid7)
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id"))
    kind: Mapped[str] = mapped_column(default="end_user", server_default="end_user")
    subject: Mapped[str]
    state: Mapped[str] = mapped_column(default="queued")
    asked_by: Mapped[str] = mapped_column(default="", server_default="")
    job_id: Mapped[UUID | None]
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    spool_records: Mapped[int] = mapped_column(default=0, server_default="0")
    late_rows: Mapped[int] = mapped_column(default=0, server_default="0")
    spool_clean_at: Mapped[datetime | None]
    forgotten_at: Mapped[datetime | None]
    certificate: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    created_at: Mapped[Now]
    finished_at: Mapped[datetime | None]


class LogSpool(Base):
    """A log spool that some machine's shipper reads: an erasure is not done before each has said that it is clean.

    `id` lies in the spool itself, so that it outlives names of machines; `seen_at` is when its shipper last said so.
    """

    __tablename__ = "log_spool"
    id: Mapped[Key]
    host: Mapped[str]
    path: Mapped[str]
    seen_at: Mapped[Now]


class ErasureSpool(Base):
    """A spool's word that it holds a request's subject no more. `spool_id` outlives the spool it names."""

    __tablename__ = "erasure_spool"
    request_id: Mapped[UUID] = mapped_column(ForeignKey("erasure_request.id", ondelete="CASCADE"), primary_key=True)
    spool_id: Mapped[UUID] = mapped_column(primary_key=True)
    records: Mapped[int]
    clean_at: Mapped[Now]


class ErasedRow(Base):
    """What an unfinished erasure has taken out so far, so that it can look again for what was written meanwhile.

    Ids only; gone with the erasure's end.
    """

    __tablename__ = "erased_row"
    __table_args__ = (one_of("kind", "interaction", "example"),)
    request_id: Mapped[UUID] = mapped_column(ForeignKey("erasure_request.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    row_id: Mapped[UUID] = mapped_column(primary_key=True)
