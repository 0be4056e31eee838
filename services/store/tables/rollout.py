"""What serves, what is being tried, and what engines report."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of

ROLLOUT_STAGES = (
    "shadow", "canary", "promoted", "rolled_back", "rejected", "quarantined", "stopped", "superseded",
)  # fmt: skip


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
    # Since somebody last looked; so many freeze promotion.
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
