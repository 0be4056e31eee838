"""Runs, what they make, and how it is judged."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of

RUN_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
ARTIFACT_STATES = (
    "built", "verified", "staged", "shadow", "canary", "live", "retired", "rejected", "quarantined", "rolled_back",
)  # fmt: skip


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
