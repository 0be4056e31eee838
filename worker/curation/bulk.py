"""Runs a bulk action, or its undo, batch by batch: each batch with its records and its progress in one transaction."""

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from services.errors import WhetError
from services.settings import Settings
from services.store import bulk
from services.store.bulk import Place, Selection
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import BulkAction, Project
from worker.curation.split import Chosen, assign
from worker.curation.strata import order_hash

BATCH = 500
HELD_OUT_SHARE = 0.2

log = structlog.get_logger()


def bulk_job(lease: Lease, settings: Settings) -> None:  # noqa: ARG001 - every handler has these two
    """Handler of "interactions.bulk". Taken up again after a crash, it goes on behind its last batch."""
    action_id = UUID(lease.payload["action_id"])
    more = True
    while more:
        if lease.cancelled():
            raise JobCancelled
        try:
            with lease.transaction() as session:
                more = step(session, action_id)
                if not more:
                    lease.succeed(session)
        except WhetError as error:
            raise JobFailed(error.message) from error
    log.info("bulk action ended", action=str(action_id))


def step(session: Session, action_id: UUID) -> bool:
    """Deal with one batch; whether there may be more."""
    action = session.get(BulkAction, action_id, with_for_update=True, populate_existing=True)
    if action is None or action.state not in bulk.UNFINISHED:
        return False
    if action.state == "undoing":
        return _undo(session, action)
    action.state = "running"
    selection = Selection.read(action.selection)
    ids = selection.take(session, action.project_id, action.place, BATCH, bulk.BATCH_SECONDS)
    if ids:
        action.changed += _apply(session, action, ids)
        action.seen += len(ids)
        action.place = ids[-1]
        return True
    _end(action, "done")
    return False


def _apply(session: Session, action: BulkAction, ids: Sequence[UUID]) -> int:
    if action.kind == "tag":
        return bulk.tag(session, action, ids)
    if action.kind == "withdraw":
        return bulk.withdraw(session, action, ids)
    project = session.get_one(Project, action.project_id, with_for_update={"key_share": True}, populate_existing=True)
    share = float(project.config.get("held_out_share", HELD_OUT_SHARE))
    chosen = [Chosen(one, group) for one, group in bulk.candidates(session, ids).items()]
    sides = assign(session, action.project_id, chosen, share)
    places = {one: Place(side, order_hash(str(action.id), one)) for one, side in sides.items()}
    return bulk.to_review(session, action, places)


def _undo(session: Session, action: BulkAction) -> bool:
    batch = bulk.changes(session, action, BATCH)
    if not batch:
        _end(action, "undone")
        return False
    restored = bulk.restore(session, action, batch)
    action.restored += restored
    action.kept += len(batch) - restored
    action.place = batch[-1].interaction_id
    return True


def _end(action: BulkAction, state: str) -> None:
    action.state, action.finished_at = state, datetime.now(UTC)
