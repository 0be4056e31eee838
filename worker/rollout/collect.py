"""Artefact directories that nothing in the database knows: left by a crash between the rename and the row."""

import shutil
import time
from pathlib import Path

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store.models import Artifact

ORPHAN_SECONDS = 24 * 3600.0

log = structlog.get_logger()


def collect_orphans(session: Session, artifacts: Path, *, older_than: float = ORPHAN_SECONDS) -> list[str]:
    """Delete entries older than `older_than` seconds whose name is no artefact's digest; returns their names.

    Young ones may belong to a trainer that is about to write its row.
    """
    if not artifacts.is_dir():
        return []
    horizon = time.time() - older_than
    old = {entry.name: entry for entry in artifacts.iterdir() if entry.lstat().st_mtime < horizon}
    known = set(session.scalars(select(Artifact.digest).where(Artifact.digest.in_(old))))
    orphans = sorted(old.keys() - known)
    for name in orphans:
        _remove(old[name])
        log.warning("orphan artefact collected", name=name)
    return orphans


def _remove(entry: Path) -> None:
    if entry.is_symlink() or not entry.is_dir():
        entry.unlink(missing_ok=True)
    else:
        shutil.rmtree(entry)
