"""The ledger with everything around it: a real Redis, a real Celery worker, a dispatcher."""

import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import func, select, text, update

from services.platform.accounts import server_account
from services.platform.process import Guarded
from services.platform.redis import RedisServer
from services.settings import Settings
from services.store import jobs
from services.store.base import Sessions
from services.store.models import AuditEvent, Job
from tests.worker_jobs.conftest import Process, eventually
from worker.dispatcher import Dispatcher

Start = Callable[..., Process]
WORKER = "tests.worker_jobs.process"


@pytest.fixture
def worker(start: Start, settings: Settings) -> Process:
    return start(WORKER)


@pytest.fixture
def ledger(sessions: Sessions) -> "Ledger":
    return Ledger(sessions)


class Ledger:
    """What the tests ask of the ledger."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions

    def add(self, kind: str, **payload: str) -> UUID:
        with self.sessions.begin() as session:
            return jobs.enqueue(session, kind, payload).id

    def read(self, job_id: UUID) -> Job:
        with self.sessions() as session:
            return jobs.get(session, job_id)

    def ends(self, job_id: UUID, state: str, seconds: float = 60.0) -> Job:
        eventually(lambda: self.read(job_id).state not in ("queued", "running"), seconds)
        job = self.read(job_id)
        assert job.state == state, job.error
        return job

    def effects(self, job_id: UUID) -> list[str]:
        with self.sessions() as session:
            return list(session.scalars(select(AuditEvent.actor).where(AuditEvent.subject == str(job_id))))

    def run_out(self, job_id: UUID) -> None:
        """As if the lease had been silent for a minute."""
        with self.sessions.begin() as session:
            past = func.now() - timedelta(seconds=1)
            session.execute(update(Job).where(Job.id == job_id, Job.state == "running").values(lease_expires_at=past))


def test_jobs_are_done_failures_recorded_and_cancellation_heard(
    ledger: Ledger, dispatcher: Dispatcher, worker: Process
) -> None:
    many = [ledger.add("effect") for _ in range(20)]
    hopeless, unknown, endless = ledger.add("hopeless"), ledger.add("no such kind"), ledger.add("until_cancelled")

    for job_id in many:
        ledger.ends(job_id, "succeeded")
    assert [ledger.effects(job_id) for job_id in many] == [["attempt 1"]] * 20
    assert ledger.ends(hopeless, "failed").error == "there is nothing to learn from"
    assert "knows no job of kind" in (ledger.ends(unknown, "failed").error or "")
    eventually(lambda: ledger.read(endless).state == "running")
    with ledger.sessions.begin() as session:
        jobs.request_cancel(session, endless)
    ledger.ends(endless, "cancelled")


def test_a_bug_is_tried_three_times_and_leaves_its_traceback(
    ledger: Ledger, dispatcher: Dispatcher, worker: Process
) -> None:
    job_id = ledger.add("broken")

    for attempt in (1, 2):
        eventually(lambda attempt=attempt: ledger.read(job_id).attempts == attempt)  # type: ignore[misc]
        eventually(lambda: ledger.read(job_id).state == "queued")
        with ledger.sessions.begin() as session:
            session.execute(update(Job).where(Job.id == job_id).values(not_before=func.now()))

    dead = ledger.ends(job_id, "dead")
    assert dead.attempts == 3
    assert "ZeroDivisionError: a bug" in (dead.error or "")
    assert "in broken" in (dead.log_tail or "")


def test_a_worker_killed_in_the_middle_costs_one_rerun_and_leaves_one_effect(
    ledger: Ledger, dispatcher: Dispatcher, worker: Process, home: Path
) -> None:
    pid_file = home / "pid"
    job_id = ledger.add("stuck_once", pid_file=str(pid_file))
    eventually(lambda: pid_file.exists() and pid_file.read_text() != "")

    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    ledger.run_out(job_id)

    assert ledger.ends(job_id, "succeeded").fence == 2
    assert ledger.effects(job_id) == ["attempt 2"]


def test_a_worker_told_to_stop_hands_its_job_back_at_once(
    ledger: Ledger, dispatcher: Dispatcher, worker: Process, start: Start, home: Path
) -> None:
    pid_file = home / "pid"
    job_id = ledger.add("stopped_once", pid_file=str(pid_file))
    eventually(lambda: pid_file.exists() and pid_file.read_text() != "")

    os.kill(worker.pid, signal.SIGTERM)
    worker.popen.wait(10)
    assert ledger.read(job_id).state == "queued"
    start(WORKER)

    ledger.ends(job_id, "succeeded")
    assert ledger.effects(job_id) == ["attempt 1"]


def test_a_flushed_redis_loses_no_job(
    ledger: Ledger, dispatcher: Dispatcher, settings: Settings, start: Start, redis_server: RedisServer
) -> None:
    before = [ledger.add("effect") for _ in range(5)]
    eventually(lambda: all(ledger.read(job_id).published_at for job_id in before))
    redis_server.command("FLUSHALL")

    start(WORKER)
    for job_id in before:
        ledger.ends(job_id, "succeeded")
    redis_server.command("FLUSHALL")
    after = ledger.add("effect")

    ledger.ends(after, "succeeded")
    assert ledger.effects(after) == ["attempt 1"]


@pytest.fixture
def own_redis(home: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """A Redis that is not running yet."""
    server = RedisServer(home / "redis", home / "run", server_account())
    monkeypatch.setenv("REDIS_URL", server.url())
    return server


def test_jobs_wait_while_redis_is_away_and_run_when_it_is_back(
    ledger: Ledger, own_redis: RedisServer, home: Path, start: Start
) -> None:
    dispatcher = Dispatcher(Settings(), republish_seconds=0.5)
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    try:
        start(WORKER)
        own_redis.prepare()
        for _ in range(2):
            job_id = ledger.add("effect")
            threading.Event().wait(1.0)
            assert ledger.read(job_id).state == "queued"
            running = Guarded(own_redis.part(), home / "logs" / "redis.log")
            running.wait_ready()
            ledger.ends(job_id, "succeeded")
            running.stop()
    finally:
        dispatcher.stop()
        thread.join(15)
    assert not thread.is_alive()


def test_cut_connections_to_postgres_cost_nothing(ledger: Ledger, dispatcher: Dispatcher, worker: Process) -> None:
    ledger.ends(ledger.add("effect"), "succeeded")

    with ledger.sessions() as session:
        cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
        assert session.scalar(text(f"{cut} AND pid <> pg_backend_pid()")) >= 3
    job_id = ledger.add("effect")

    ledger.ends(job_id, "succeeded")
    assert ledger.effects(job_id) == ["attempt 1"]


def test_one_dispatcher_leads_and_the_next_takes_over_when_it_is_killed(settings: Settings, start: Start) -> None:
    first = start("worker.dispatcher")
    eventually(lambda: first.said("dispatcher leads"))
    second = start("worker.dispatcher")
    threading.Event().wait(2.0)
    assert not second.said("dispatcher leads")

    os.kill(first.pid, signal.SIGKILL)

    eventually(lambda: second.said("dispatcher leads"))
    os.kill(second.pid, signal.SIGTERM)
    assert second.popen.wait(10) == 0
    assert second.said("dispatcher stopped")
