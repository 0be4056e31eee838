"""What runs have on disk while they train: rows and checkpoints, below `runs/<run>/<fence>/` of the home."""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store import runs
from services.store.models import Run


def sweep_finished(session: Session, home: Path) -> list[str]:
    """Remove what runs that are over have left, however they ended; returns what has gone. Raises OSError.

    What is there is listed before the runs are asked for: a directory is made by a run that is unfinished by then.
    """
    found = _entries(home / "runs")
    unfinished = {str(run_id) for run_id in session.scalars(select(Run.id).where(Run.state.in_(runs.UNFINISHED)))}
    return _remove(path for path in found if path.name not in unfinished)


def sweep_attempts(home: Path, run_id: str, keep: Collection[str]) -> None:
    """Remove what earlier attempts of a run left, except the entries named in `keep`."""
    _remove(path for path in _entries(home / "runs" / run_id) if path.name not in keep)


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.exists() else []


def _remove(paths: Iterable[Path]) -> list[str]:
    removed = []
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            removed.append(path.name)
    return removed
