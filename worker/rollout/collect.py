"""Artefact directories that nothing in the database knows: left by a crash between the rename and the row."""

import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store.models import Artifact, Run

ORPHAN_SECONDS = 24 * 3600.0
MANIFEST_BYTES = 1 << 20
UNFINISHED = ("queued", "running")

log = structlog.get_logger()


def collect_orphans(
    session: Session, artifacts: Path, *, older_than: float = ORPHAN_SECONDS, warned: set[str] | None = None
) -> list[str]:
    """Delete artefacts older than `older_than` seconds that have no row, when their run has one and is over as long.

    An artefact of a run this database has never seen belongs to another database or to a newer dump, so it stays, as
    does anything else that is no artefact. `warned` remembers, between calls, what has been reported. Returns the
    names deleted.
    """
    warned = set() if warned is None else warned
    old = _old_entries(artifacts, time.time() - older_than)
    known = set(session.scalars(select(Artifact.digest).where(Artifact.digest.in_(old))))
    collected = []
    for name in sorted(old.keys() - known):
        try:
            run_id = _read_run(old[name])
            if run_id is not None and _is_over(session, run_id, older_than):
                shutil.rmtree(old[name])
                collected.append(name)
                log.warning("orphan artefact collected", name=name, run=str(run_id))
            elif name not in warned:
                warned.add(name)
                log.warning("not an artefact of this database; left alone", name=name)
        except OSError as error:
            log.warning("cannot collect an orphan artefact", name=name, error=str(error))
    return collected


def _old_entries(artifacts: Path, horizon: float) -> dict[str, Path]:
    """Entries unchanged since `horizon`. Young ones may belong to a trainer that is about to write its row."""
    old = {}
    try:
        for entry in artifacts.iterdir():
            # An entry that vanishes meanwhile ends this look; the next one comes within the hour.
            if entry.lstat().st_mtime < horizon:
                old[entry.name] = entry
    except FileNotFoundError:
        return old
    except OSError as error:
        log.warning("cannot list the artefacts", path=str(artifacts), error=str(error))
    return old


def _read_run(entry: Path) -> UUID | None:
    """The run that a whole artefact's manifest names; None for anything else. Raises OSError."""
    manifest = entry / "manifest.json"
    if entry.is_symlink() or not entry.is_dir() or not manifest.is_file():
        return None
    if manifest.stat().st_size > MANIFEST_BYTES:
        return None
    try:
        content = json.loads(manifest.read_bytes())
        return UUID(content["run"]) if isinstance(content, dict) and isinstance(content.get("run"), str) else None
    except (ValueError, RecursionError):
        return None


def _is_over(session: Session, run_id: UUID, seconds: float) -> bool:
    horizon = datetime.now(UTC) - timedelta(seconds=seconds)
    query = select(Run.id).where(Run.id == run_id, Run.state.not_in(UNFINISHED), Run.finished_at < horizon)
    return session.scalar(query) is not None
