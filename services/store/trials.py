"""A candidate's trial as rows: the open one of a project, the last ones, and closing it with what it came to."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from services.store import runs
from services.store.models import Rollout, RolloutCount
from services.store.rollout_config import RolloutConfig

OPEN = ("shadow", "canary")
# What has served nobody, or only was stopped, is retired and may be tried again; a condemned one never goes live again.
STATE_OF_ENDING: Mapping[str, str] = {
    "promoted": "live", "rolled_back": "rolled_back", "quarantined": "quarantined",
    "rejected": "retired", "stopped": "retired", "superseded": "retired",
}  # fmt: skip


def open_of(session: Session, project_id: UUID, *, lock: bool = False) -> Rollout | None:
    """The trial under way. Whoever locks it holds the deployment's row already, so that all lock in one order."""
    query = select(Rollout).where(Rollout.project_id == project_id, Rollout.stage.in_(OPEN))
    if lock:
        query = query.with_for_update()
    return session.scalar(query.execution_options(populate_existing=True))


def latest(session: Session, project_id: UUID) -> Rollout | None:
    """The trial under way, or the one that ended last."""
    newest = select(Rollout).where(Rollout.project_id == project_id).order_by(Rollout.id.desc()).limit(1)
    return session.scalar(newest.execution_options(populate_existing=True))


def all_open(session: Session) -> list[Rollout]:
    """Every project's, oldest first."""
    return list(session.scalars(select(Rollout).where(Rollout.stage.in_(OPEN)).order_by(Rollout.id)))


def config_of(rollout: Rollout) -> RolloutConfig:
    """What it began with; another release may have known other keys."""
    known = {name: value for name, value in rollout.config.items() if name in RolloutConfig.model_fields}
    try:
        return RolloutConfig.model_validate(known)
    except ValidationError:
        return RolloutConfig()


def close(session: Session, rollout: Rollout, stage: str, ending: str) -> None:
    """End it. What single users' requests added up to is not kept."""
    rollout.stage = stage
    rollout.ending = ending
    rollout.ended_at = datetime.now(UTC)
    runs.went_on(session, rollout.digest, "live" if stage == "promoted" else stage.replace("_", " "))
    forget_counts(session, rollout)


def forget_counts(session: Session, rollout: Rollout) -> None:
    """Begin counting from nothing, or count no more."""
    session.execute(delete(RolloutCount).where(RolloutCount.rollout_id == rollout.id))
    session.flush()


def figures(rollout: Rollout) -> dict[str, Any]:
    """What a decision about it keeps as evidence: the last look, without its words."""
    told: dict[str, Any] = rollout.verdict
    found: dict[str, Any] = {"share": rollout.share, "signal": rollout.config.get("signal", "feedback")}
    for name, arms in (("requests", told.get("requests")), ("users", told.get("users"))):
        if arms:
            found |= {f"candidate_{name}": arms[0], f"control_{name}": arms[1]}
    signal = told.get("signal")
    if signal:
        found |= {"difference": signal["estimate"], "low": signal["low"], "high": signal["high"]}
    return found
