"""`whet erase` and `whet spool`, as typed, against a console that runs."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import func, select, update

from services.platform.postgres import PostgresServer
from services.store import erasure_spools
from services.store.certificate import verified
from services.store.models import Interaction, Job, LogSpool
from tests.erasure.searching import tables_with
from tests.erasure.seeding import ask
from tests.gateway.parts import World, eventually, free_port, make_world
from worker.tasks import perform

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(postgres: PostgresServer) -> Iterator[World]:
    """With a console, and somebody who does the jobs."""
    with make_world(postgres, WHET_CONSOLE_PORT=str(free_port())) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        made.start("services.console.main")
        url = f"http://127.0.0.1:{made.settings.console_port}"
        eventually(lambda: answers(f"{url}/health"), 60)
        stopping = threading.Event()
        worker = threading.Thread(target=work, args=(made, stopping))
        worker.start()
        yield made
        stopping.set()
        worker.join()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.TransportError:
        return False


def work(world: World, stopping: threading.Event) -> None:
    while not stopping.wait(0.1):
        with world.sessions() as session:
            waiting = select(Job.id).where(Job.kind == "erase", Job.state == "queued", Job.not_before <= func.now())
            found = session.scalars(waiting).all()
        for job_id in found:
            perform(world.sessions, world.settings, job_id)


def whet(world: World, *arguments: str, answer: str | None = None) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{world.settings.console_port}"
    environment = world.environment | {"WHET_URL": url, "WHET_API_KEY": world.keys["admin"], "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments], cwd=ROOT, env=environment, input=answer, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip


def test_whet_erase_asks_erases_and_writes_the_certificate(world: World, tmp_path: Path) -> None:
    mark = f"typed{uuid4().hex}"
    kept = ask(world, mark, mark)
    subject = ("erase", "--end-user", f"{mark}-user", "--project", "entities")

    refused = whet(world, *subject, answer="n\n")
    assert refused.returncode == 1
    assert "1  interaction" in refused.stdout
    with world.sessions() as session:
        assert session.get(Interaction, kept) is not None

    done = whet(world, *subject, "--yes", "--certificate", str(tmp_path / "certificate.json"))
    assert done.returncode == 0, done.stderr
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert verified(certificate)
    assert f"done; certificate {certificate['hash']}" in done.stdout
    assert certificate["project"] == "entities"
    with world.sessions() as session:
        assert tables_with(session, mark) == []

    again = whet(world, *subject, "--yes", "--certificate", str(tmp_path / "certificate.json"))
    assert again.returncode == 1
    assert "exists; name a new file" in again.stderr


def test_whet_erase_wants_one_subject(world: World) -> None:
    for wrong in (("erase",), ("erase", "--end-user", "a", "--session", "b")):
        refused = whet(world, *wrong)
        assert refused.returncode == 1
        assert "name whom to erase" in refused.stderr


def test_whet_spool_lists_spools_and_forgets_the_silent(world: World) -> None:
    gone = uuid4()
    with world.sessions.begin() as session:
        session.add(LogSpool(id=gone, host="elsewhere", path="/srv/spool"))
        session.flush()
        session.execute(update(LogSpool).where(LogSpool.id == gone).values(seen_at=func.now() - erasure_spools.SILENT))
    listed = whet(world, "spool", "list")
    assert f"{gone}" in listed.stdout
    assert str(world.settings.spool) in listed.stdout
    with world.sessions() as session:
        (alive,) = [one.id for one in erasure_spools.list_(session) if one.id != gone]
    refused = whet(world, "spool", "forget", str(alive))
    assert refused.returncode == 1
    assert "shipper is running" in refused.stderr
    assert "elsewhere:/srv/spool is forgotten" in whet(world, "spool", "forget", str(gone)).stdout
    assert str(gone) not in whet(world, "spool", "list").stdout
