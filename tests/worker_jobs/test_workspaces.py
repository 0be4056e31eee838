"""What a run read lies on disk no longer than the run, also where no worker ends it."""

from pathlib import Path
from uuid import UUID

import pytest

from services.settings import Settings
from services.store import projects, runs
from services.store.base import Sessions
from services.store.models import Job, Run
from tests.worker_jobs.conftest import eventually
from worker.dispatcher import Dispatcher
from worker.training import workspace


def between_attempts(sessions: Sessions, home: Path, slug: str) -> Run:
    """A run whose first attempt was killed and whose second nobody has begun; its rows are on disk."""
    with sessions.begin() as session:
        run = runs.start(session, projects.create(session, slug), params={}, created_by="ada")
        runs.enter_phase(session, run, "training")
        job = session.get_one(Job, run.job_id)
        job.attempts = 1
    read = home / "runs" / str(run.id) / "1"
    read.mkdir(parents=True)
    (read / "rows.jsonl").write_text("what somebody asked")
    return run


@pytest.fixture
def left(sessions: Sessions, home: Path) -> dict[str, UUID]:
    """Runs that no worker holds: one whose job died, one cancelled, and one that goes on."""
    made = {name: between_attempts(sessions, home, name) for name in ("dead", "cancelled", "going-on")}
    with sessions.begin() as session:
        session.get_one(Job, made["dead"].job_id).state = "dead"
        runs.request_cancel(session, made["cancelled"].id)
    return {name: run.id for name, run in made.items()}


def test_the_dispatcher_removes_what_runs_left_that_ended_without_their_worker(
    left: dict[str, UUID], settings: Settings, sessions: Sessions, dispatcher: Dispatcher
) -> None:
    directory = settings.home / "runs"
    eventually(lambda: {path.name for path in directory.iterdir()} == {str(left["going-on"])})
    assert (directory / str(left["going-on"]) / "1" / "rows.jsonl").exists()
    assert state(sessions, left["dead"]) == "failed"


@pytest.fixture
def unreadable(home: Path) -> None:
    (home / "runs").write_text("no directory")


def test_a_disk_that_cannot_be_read_stops_no_dispatcher(
    unreadable: None, dispatcher: Dispatcher, sessions: Sessions
) -> None:
    for name in ("first", "second"):
        with sessions.begin() as session:
            run = runs.start(session, projects.create(session, name), params={}, created_by="ada")
            session.get_one(Job, run.job_id).state = "dead"
        eventually(lambda run_id=run.id: state(sessions, run_id) == "failed", 20)  # type: ignore[misc]


def state(sessions: Sessions, run_id: UUID) -> str:
    with sessions() as session:
        return runs.get(session, run_id).state


def test_what_cannot_be_removed_is_not_called_gone(sessions: Sessions, home: Path) -> None:
    (home / "runs").mkdir()
    (home / "runs" / "note.txt").write_text("somebody's")
    with sessions() as session:
        assert workspace.sweep_finished(session, home) == []
