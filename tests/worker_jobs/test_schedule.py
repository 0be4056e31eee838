"""What the dispatcher does unasked, and how a deaf worker is found out."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from structlog.testing import capture_logs

from services.store import jobs, projects
from services.store.base import Sessions
from services.store.models import Job
from worker import schedule
from worker.tasks import worker_name
from worker.watchdog import LOOKS, Watchdog

HOUR = timedelta(hours=1)


@pytest.fixture
def project_id(sessions: Sessions) -> UUID:
    with sessions.begin() as session:
        return projects.create(session, "support", config={"window_seconds": 3600, "window_grace_seconds": 60}).id


def sample(sessions: Sessions, sampler: schedule.Sampler, now: datetime) -> list[UUID]:
    with sessions.begin() as session:
        return sampler.step(session, now)


def finish_all(sessions: Sessions) -> None:
    with sessions.begin() as session:
        session.execute(update(Job).values(state="succeeded", finished_at=func.now()))


def this_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def test_each_closed_window_is_sampled_once(sessions: Sessions, project_id: UUID) -> None:
    sampler = schedule.Sampler()
    next_hour = this_hour() + HOUR

    assert sample(sessions, sampler, next_hour - timedelta(minutes=1)) == [project_id]
    assert sample(sessions, sampler, next_hour - timedelta(seconds=1)) == []
    finish_all(sessions)

    assert sample(sessions, sampler, next_hour + timedelta(seconds=64)) == [], "feedback may still come"
    assert sample(sessions, sampler, next_hour + timedelta(seconds=66)) == [project_id]
    with sessions() as session:
        assert session.scalars(select(Job.payload)).all() == [{"project_id": str(project_id)}] * 2


def test_a_restarted_dispatcher_samples_no_window_twice(sessions: Sessions, project_id: UUID) -> None:
    now = this_hour() + timedelta(minutes=59)
    assert sample(sessions, schedule.Sampler(), now) == [project_id]
    finish_all(sessions)

    assert sample(sessions, schedule.Sampler(), now) == []


def test_a_sampling_that_still_runs_is_not_doubled(sessions: Sessions, project_id: UUID) -> None:
    sampler = schedule.Sampler()
    next_hour = this_hour() + HOUR
    sample(sessions, sampler, next_hour)

    assert sample(sessions, sampler, next_hour + HOUR) == []
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1


def test_an_unanswered_heartbeat_raises_the_alarm(sessions: Sessions) -> None:
    with capture_logs() as said, sessions.begin() as session:
        schedule.heartbeat(session)
        assert said == []
        schedule.heartbeat(session)

    assert [(line["log_level"], line["queue"]) for line in said] == [("error", "cpu"), ("error", "train")]


def test_a_heartbeat_that_waits_for_busy_workers_raises_no_alarm(sessions: Sessions) -> None:
    with capture_logs() as said, sessions.begin() as session:
        schedule.heartbeat(session)
        running = jobs.enqueue(session, "train", {}, queue="train").id
        session.execute(update(Job).where(Job.id == running).values(state="running"))
        schedule.heartbeat(session)

    assert [(line["log_level"], line["queue"]) for line in said] == [("error", "cpu"), ("info", "train")]


def rung_long_ago(sessions: Sessions) -> UUID:
    with sessions.begin() as session:
        job_id = jobs.enqueue(session, "heartbeat", {}).id
        long_ago = func.now() - timedelta(minutes=5)
        session.execute(update(Job).where(Job.id == job_id).values(published_at=long_ago, not_before=long_ago))
        return job_id


def looks(sessions: Sessions, watchdog: Watchdog, count: int) -> list[bool]:
    with sessions() as session:
        return [watchdog.look(session) for _ in range(count)]


def test_a_worker_with_a_free_hand_that_takes_no_job_is_deaf(sessions: Sessions) -> None:
    rung_long_ago(sessions)

    assert looks(sessions, Watchdog("", "cpu", 2), LOOKS) == [False] * (LOOKS - 1) + [True]


def test_a_worker_with_full_hands_is_not_deaf(sessions: Sessions) -> None:
    rung_long_ago(sessions)
    with sessions.begin() as session:
        running = jobs.enqueue(session, "train", {}).id
        session.execute(update(Job).where(Job.id == running).values(state="running", worker=worker_name()))

    assert looks(sessions, Watchdog("", "cpu", 1), LOOKS) == [False] * LOOKS
    assert looks(sessions, Watchdog("", "cpu", 2), LOOKS)[-1], "one hand is free"


def test_a_different_job_at_each_look_is_a_busy_queue_not_a_deaf_worker(sessions: Sessions) -> None:
    watchdog = Watchdog("", "cpu", 2)
    for _ in range(LOOKS + 1):
        finish_all(sessions)
        rung_long_ago(sessions)
        assert looks(sessions, watchdog, 1) == [False]
