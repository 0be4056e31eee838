"""What engines say of the deployments they serve: which generation each has loaded, and when it was last heard of."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.store.models import EngineReport

# An engine that nobody has heard of for so long is away: it is not waited for, and obeys the row when it is back.
AWAY = timedelta(seconds=15)
# One that is being restarted is back within this, with what it had: weights it served are not condemned meanwhile.
RESTART = timedelta(minutes=10)


class Report(NamedTuple):
    """One project as an engine has it: `generation` is the last one it had everything loaded for; 0 is none yet."""

    project_id: UUID
    generation: int
    digests: tuple[str, ...]


def put(session: Session, engine: str, epoch: int, reports: Collection[Report]) -> None:
    """Say what changed. The epoch tells one start of an engine from the next."""
    if not reports:
        return
    rows = [
        {
            "engine": engine, "project_id": one.project_id, "epoch": str(epoch), "generation": one.generation,
            "digests": list(one.digests),
        }
        for one in reports
    ]  # fmt: skip
    statement = insert(EngineReport)
    changed = {name: getattr(statement.excluded, name) for name in ("epoch", "generation", "digests")}
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["engine", "project_id"],
            set_=changed | {"seen_at": func.now(), "changed_at": func.now()},
        ),
        rows,
    )


def seen(session: Session, engine: str) -> None:
    """The engine is there, and nothing has changed."""
    session.execute(update(EngineReport).where(EngineReport.engine == engine).values(seen_at=func.now()))


def of_project(session: Session, project_id: UUID) -> Sequence[EngineReport]:
    """Every engine that has ever served the project, by name."""
    mine = select(EngineReport).where(EngineReport.project_id == project_id)
    return session.scalars(mine.order_by(EngineReport.engine).execution_options(populate_existing=True)).all()


def others(session: Session, project_id: UUID, engine: str) -> list[EngineReport]:
    """What the other engines say that are there, or that served something of the project when they were last heard of
    and may only be restarting."""
    now = datetime.now(UTC)
    return [
        report
        for report in of_project(session, project_id)
        if report.engine != engine and now - report.seen_at <= (RESTART if report.digests else AWAY)
    ]


def lagging(session: Session, project_id: UUID, generation: int, digest: str, now: datetime) -> list[str]:
    """Engines that are there and have not loaded `digest`, or something else that this generation may route to them."""
    return [
        report.engine
        for report in _there(session, project_id, now)
        if report.generation < generation or digest not in report.digests
    ]


def loaded_since(session: Session, project_id: UUID, digests: Collection[str], now: datetime) -> datetime | None:
    """Since when no engine that is there has changed what it has loaded; None while one of them lacks a digest.

    Where no engine is heard of, nothing is known against any moment.
    """
    there = _there(session, project_id, now)
    if any(not set(digests) <= set(report.digests) for report in there):
        return None
    return _unchanged(there)


def unchanged_since(session: Session, project_id: UUID, now: datetime) -> datetime | None:
    """Since when no engine that is there was started or changed what it has loaded; None where none is heard of."""
    there = _there(session, project_id, now)
    return _unchanged(there) if there else None


def _unchanged(reports: Sequence[EngineReport]) -> datetime:
    return max((report.changed_at for report in reports), default=datetime.fromtimestamp(0, UTC))


def _there(session: Session, project_id: UUID, now: datetime) -> list[EngineReport]:
    return [report for report in of_project(session, project_id) if now - report.seen_at <= AWAY]
