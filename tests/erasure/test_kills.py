"""An erasure that is killed at any of its phases, and taken up again, ends complete and with one certificate."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update

from services.store import erasure, jobs, revisions
from services.store.certificate import verified
from services.store.examples import digest_of
from services.store.models import AuditEvent, ErasedRow, ErasureRequest, Job, LogSpool
from tests.erasure.searching import files_with, tables_with
from tests.erasure.seeding import ask
from tests.gateway.judging import judge, person, queued
from tests.gateway.parts import World, eventually
from worker.curation.build import build_revision
from worker.tasks import perform

ROOT = Path(__file__).parents[2]
# The pages are committed one by one: killed after the first, the second attempt finds the rest.
FAILPOINTS = [
    "begun", "shipped", "page", "emptied", "stopped", "swept", "rebuilt", "cleaned", "forgotten", "certified",
]  # fmt: skip


@pytest.fixture(scope="module")
def lead(world: World) -> UUID:
    return person(world, "lead@example.org", "lead")


def taught(world: World, lead: UUID, mark: str) -> None:
    """Somebody's answer, corrected, in a revision."""
    item = queued(world, str(ask(world, mark, mark)), group=mark)
    judge(world, item, lead, "correct", f"{mark} corrected")
    with world.sessions.begin() as session:
        build_revision(session, world.projects["entities"], "golden")


def requested(world: World, mark: str) -> ErasureRequest:
    with world.sessions.begin() as session:
        return erasure.request(session, erasure.checked(world.projects["entities"], "end_user", f"{mark}-user"), "me")


def kill_at(world: World, job_id: UUID, failpoint: str) -> None:
    """One attempt in a process that dies there; then its lease runs out."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.erasure.attempt", str(job_id)],
        cwd=ROOT, env={**world.environment, "WHET_FAILPOINT": failpoint}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 137, process.stderr.decode()[-3000:]
    with world.sessions.begin() as session:
        lapsed = func.now() - timedelta(seconds=1)
        session.execute(update(Job).where(Job.state == "running").values(lease_expires_at=lapsed))
    with world.sessions.begin() as session:
        jobs.expire(session)
        session.execute(update(Job).values(not_before=func.now()))


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_at_any_phase_it_ends_complete_with_one_certificate(world: World, lead: UUID, failpoint: str) -> None:
    mark = f"kill{failpoint}{uuid4().hex}"
    taught(world, lead, mark)
    made = requested(world, mark)

    assert made.job_id is not None
    kill_at(world, made.job_id, f"erase.{failpoint}")
    if failpoint != "certified":
        perform(world.sessions, world.settings, made.job_id)

    with world.sessions() as session:
        done = erasure.get(session, made.id)
        assert done.state == "done", session.get_one(Job, made.job_id).error
        assert done.certificate is not None
        assert verified(done.certificate)
        rows = done.certificate["rows"]
        assert (rows["interaction"], rows["example"], rows["annotation"], rows["review_item"]) == (1, 1, 1, 1)
        (rebuilt,) = done.certificate["revisions"]
        assert rebuilt["examples_erased"] == 1
        said = select(func.count()).where(
            AuditEvent.action == "erasure.done", AuditEvent.subject == f"erasure:{made.id}"
        )
        assert session.scalar(said) == 1
        assert session.scalar(select(func.count()).select_from(ErasedRow)) == 0
        assert tables_with(session, mark) == []
        old = revisions.locate(session, rebuilt["from"]).revision
        assert digest_of(revisions.manifest(session, old.id)) == old.digest
    assert files_with(world.settings.home, mark) == []


def test_a_shipper_killed_after_scrubbing_says_so_when_it_is_back(world: World, lead: UUID) -> None:
    mark = f"scrub{uuid4().hex}"
    taught(world, lead, mark)
    for process in world.processes:
        if "log_shipper" in str(process.log):
            process.stop()
    dying = world.start_shipper(WHET_FAILPOINT="shipper.scrubbed")
    made = requested(world, mark)
    assert dying.wait(30) == 137
    world.start_shipper()
    assert made.job_id is not None
    perform(world.sessions, world.settings, made.job_id)
    with world.sessions() as session:
        done = erasure.get(session, made.id)
        assert done.state == "done"
        assert done.certificate is not None
        (spool,) = session.scalars(select(LogSpool))
        assert [one["spool"] for one in done.certificate["spools"]] == [str(spool.id)]
    eventually(lambda: files_with(world.settings.home, mark) == [])
