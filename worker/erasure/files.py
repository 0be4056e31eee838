"""Erased rows in files of this home: what trainings wrote down beside their artefacts, and exports."""

import shutil
from pathlib import Path
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.settings import Settings
from services.store import erasure, runs
from services.store.erasure_cover import Subject
from services.store.erasure_rows import noted
from services.store.examples import plain_hash
from services.store.jobs import Lease
from services.store.models import ErasureRequest, Example, Run
from worker.erasure import exports, progress


def clean(lease: Lease, request_id: UUID, settings: Settings) -> None:
    """Work directories of ended runs are removed, exports are written again without the rows."""
    with lease.sessions() as session:
        made = erasure.get(session, request_id)
        finished = _ended_runs(session, made)
        gone = _gone(session, made)
    removed = sum(_remove(settings.home / "runs" / str(run_id)) for run_id in finished)
    found = exports.clean(settings.home / "exports", gone)
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        progress.count(made, {"files": removed + found.rewritten, "exported_rows": found.rows})
        made.progress = {**made.progress, "exports_not_searched": found.not_searched}


def _ended_runs(session: Session, made: ErasureRequest) -> list[UUID]:
    over = select(Run.id).where(Run.project_id.in_(progress.projects(session, made)))
    return list(session.scalars(over.where(Run.state.not_in(runs.UNFINISHED))))


def _remove(directory: Path) -> int:
    if not directory.exists():
        return 0
    shutil.rmtree(directory)
    return 1


def _gone(session: Session, made: ErasureRequest) -> exports.Gone:
    """How rows of an export are known: by the hash of their example or the id of their interaction, and by who asked
    them, for those whose log had passed its retention."""
    hashes = session.scalars(select(Example.content_hash).where(Example.id.in_(noted(made, "example"))))
    ids = {str(one) for one in session.scalars(noted(made, "interaction"))}
    names = frozenset(ids | {plain_hash(one) for one in hashes})
    return exports.Gone(names, Subject.of(made), progress.utc(made.created_at))
