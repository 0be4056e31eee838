"""Jobs, the audit log, and erasure."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of, uuid7

JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled", "dead")
ERASURE_KINDS = ("end_user", "session")


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
