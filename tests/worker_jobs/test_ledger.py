"""The ledger alone: who may work on a job, and what a worker that lost it can still do (nothing)."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select, update

from services.errors import Conflict, NotFound
from services.store import audit, jobs
from services.store.base import Sessions, make_sessions, uuid7
from services.store.jobs import Lease, LostLease
from services.store.models import AuditEvent, Job
from tests.worker_jobs.conftest import eventually


def add(sessions: Sessions, **options: object) -> UUID:
    with sessions.begin() as session:
        return jobs.enqueue(session, "test", {"n": 1}, **options).id  # type: ignore[arg-type]


def read(sessions: Sessions, job_id: UUID) -> Job:
    with sessions() as session:
        return jobs.get(session, job_id)


def run_out(sessions: Sessions, job_id: UUID) -> None:
    """Let the lease lie in the past and expire it, as the dispatcher would a minute later."""
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=func.now() - timedelta(seconds=1)))
    with sessions.begin() as session:
        assert jobs.expire(session) == [job_id]


def make_due(sessions: Sessions, job_id: UUID) -> None:
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(not_before=func.now()))


def test_a_job_rolled_back_with_its_business_change_was_never_there(sessions: Sessions) -> None:
    with sessions() as session:
        job_id = jobs.enqueue(session, "test", {}).id
        session.rollback()

    with sessions() as session, pytest.raises(NotFound):
        jobs.get(session, job_id)


def test_of_eight_threads_at_twenty_jobs_each_job_is_claimed_exactly_once(database_url: str) -> None:
    sessions = make_sessions(database_url, pool_size=20)
    job_ids = [add(sessions) for _ in range(20)]
    start = threading.Barrier(8)

    def grab(name: int) -> list[UUID]:
        start.wait()
        won = []
        for job_id in job_ids:
            lease = jobs.claim(sessions, job_id, f"worker {name}")
            if lease is not None:
                won.append(job_id)
                lease.close()
        return won

    with ThreadPoolExecutor(8) as pool:
        won = [job_id for batch in pool.map(grab, range(8)) for job_id in batch]

    assert sorted(won) == sorted(job_ids)
    assert {read(sessions, job_id).fence for job_id in job_ids} == {1}
    sessions.kw["bind"].dispose()


def test_a_zombie_with_an_old_fence_writes_nothing(sessions: Sessions) -> None:
    job_id = add(sessions)
    zombie = jobs.claim(sessions, job_id, "zombie")
    assert zombie is not None
    run_out(sessions, job_id)
    make_due(sessions, job_id)
    heir = jobs.claim(sessions, job_id, "heir")
    assert heir is not None
    assert heir.fence > zombie.fence

    with pytest.raises(LostLease), zombie.transaction() as session:
        audit.record(session, "zombie", "test.effect", "job")
    with pytest.raises(LostLease):
        zombie.succeed()
    with heir.transaction() as session:
        audit.record(session, "heir", "test.effect", "job")
        heir.succeed(session)

    with sessions() as session:
        assert session.scalars(select(AuditEvent.actor)).all() == ["heir"]
    assert read(sessions, job_id).state == "succeeded"
    assert zombie.lost.is_set()
    zombie.close()
    heir.close()


def test_an_effect_and_its_jobs_ending_commit_together_or_not_at_all(sessions: Sessions) -> None:
    job_id = add(sessions)
    lease = jobs.claim(sessions, job_id, "w")
    assert lease is not None

    with lease, lease.transaction() as session:
        audit.record(session, "w", "test.effect", "job")
        lease.succeed(session)
        session.rollback()

    assert read(sessions, job_id).state == "running"
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(AuditEvent)) == 0


def test_the_heartbeat_pushes_the_leases_end_back_until_the_lease_is_closed(sessions: Sessions) -> None:
    job_id = add(sessions)
    lease = jobs.claim(sessions, job_id, "w", heartbeat_seconds=0.05)
    assert lease is not None
    first = expiry(sessions, job_id)

    eventually(lambda: expiry(sessions, job_id) > first)
    lease.close()

    last = expiry(sessions, job_id)
    threading.Event().wait(0.3)
    assert expiry(sessions, job_id) == last


def expiry(sessions: Sessions, job_id: UUID) -> datetime:
    end = read(sessions, job_id).lease_expires_at
    assert end is not None
    return end


def test_the_heartbeat_notices_that_the_lease_is_gone(sessions: Sessions) -> None:
    job_id = add(sessions)
    lease = jobs.claim(sessions, job_id, "w", heartbeat_seconds=0.05)
    assert lease is not None

    run_out(sessions, job_id)

    assert lease.lost.wait(30.0)
    lease.close()


def test_the_third_lost_lease_is_the_death_of_the_job(sessions: Sessions) -> None:
    job_id = add(sessions)
    for attempt in (1, 2, 3):
        lease = jobs.claim(sessions, job_id, "w")
        assert lease is not None
        assert lease.attempt == attempt
        run_out(sessions, job_id)
        make_due(sessions, job_id)
        lease.close()

    dead = read(sessions, job_id)
    assert (dead.state, dead.attempts) == ("dead", 3)
    assert "went silent in attempt 3" in (dead.error or "")
    assert dead.finished_at is not None
    assert jobs.claim(sessions, job_id, "w") is None


def test_a_failed_attempt_waits_longer_each_time_and_the_last_keeps_the_log(sessions: Sessions) -> None:
    job_id = add(sessions, max_attempts=2)
    first = jobs.claim(sessions, job_id, "w")
    assert first is not None
    with first:
        first.fail("boom")
    waiting = read(sessions, job_id)
    assert waiting.state == "queued"
    assert waiting.started_at is not None
    assert waiting.not_before >= waiting.started_at + timedelta(seconds=2)

    make_due(sessions, job_id)
    second = jobs.claim(sessions, job_id, "w")
    assert second is not None
    with second:
        second.fail("boom again", "line 1\nline 2")

    dead = read(sessions, job_id)
    assert (dead.state, dead.error, dead.log_tail) == ("dead", "boom again", "line 1\nline 2")


def test_a_failure_beyond_hope_is_not_tried_again(sessions: Sessions) -> None:
    job_id = add(sessions)
    lease = jobs.claim(sessions, job_id, "w")
    assert lease is not None
    with lease:
        lease.fail("the data set is empty", retry=False)

    assert (read(sessions, job_id).state, read(sessions, job_id).attempts) == ("failed", 1)


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_told(sessions: Sessions) -> None:
    queued, running = add(sessions), add(sessions)
    lease = jobs.claim(sessions, running, "w")
    assert lease is not None
    assert not lease.cancelled()

    with sessions.begin() as session:
        jobs.request_cancel(session, queued)
        jobs.request_cancel(session, running)

    assert read(sessions, queued).state == "cancelled"
    assert jobs.claim(sessions, queued, "w") is None
    assert lease.cancelled()
    with lease:
        lease.cancel()
    assert read(sessions, running).state == "cancelled"


def test_a_cancelled_job_whose_worker_died_is_not_run_again(sessions: Sessions) -> None:
    job_id = add(sessions)
    lease = jobs.claim(sessions, job_id, "w")
    assert lease is not None
    with sessions.begin() as session:
        jobs.request_cancel(session, job_id)

    run_out(sessions, job_id)

    assert read(sessions, job_id).state == "cancelled"
    lease.close()


@pytest.mark.parametrize("hand_back", [Lease.wait, Lease.fail])
def test_a_cancelled_job_does_not_wait_for_another_attempt(
    sessions: Sessions, hand_back: Callable[[Lease, str], None]
) -> None:
    job_id = add(sessions)
    lease = jobs.claim(sessions, job_id, "w")
    assert lease is not None
    with sessions.begin() as session:
        jobs.request_cancel(session, job_id)

    with lease:
        hand_back(lease, "the engine is away")

    job = read(sessions, job_id)
    assert (job.state, job.error) == ("cancelled", "cancelled on request: the engine is away")


def test_a_released_lease_costs_no_attempt(sessions: Sessions) -> None:
    job_id = add(sessions, max_attempts=1)
    lease = jobs.claim(sessions, job_id, "w")
    assert lease is not None
    with lease:
        lease.release()

    again = jobs.claim(sessions, job_id, "w")
    assert again is not None
    assert (again.attempt, again.fence) == (1, 2)
    again.close()


def test_a_dedupe_key_is_taken_until_its_job_is_finished(sessions: Sessions) -> None:
    job_id = add(sessions, dedupe_key="once")
    with sessions.begin() as session:
        with pytest.raises(Conflict):
            jobs.enqueue(session, "test", {}, dedupe_key="once")
        other = jobs.enqueue(session, "test", {}, dedupe_key="another").id

    assert read(sessions, other).state == "queued", "the transaction that met the conflict must stay usable"
    lease = jobs.claim(sessions, job_id, "w")
    assert lease is not None
    with lease:
        lease.succeed()
    assert add(sessions, dedupe_key="once") != job_id


def test_a_job_is_rung_for_once_and_again_only_when_nobody_answers(sessions: Sessions) -> None:
    low, high = add(sessions), add(sessions, priority=5)
    later = add(sessions, not_before=datetime.now(UTC) + timedelta(hours=1))

    with sessions.begin() as session:
        assert [due.job_id for due in jobs.take_due(session, republish_seconds=60)] == [high, low]
    with sessions.begin() as session:
        assert jobs.take_due(session, republish_seconds=60) == []
        assert {due.job_id for due in jobs.take_due(session, republish_seconds=0)} == {high, low}
        jobs.unpublish(session, [low])
    with sessions.begin() as session:
        assert [due.job_id for due in jobs.take_due(session, republish_seconds=60)] == [low]
    assert read(sessions, later).published_at is None


def test_only_a_job_that_was_rung_for_counts_as_overdue(sessions: Sessions) -> None:
    rung, silent = add(sessions), add(sessions)
    with sessions.begin() as session:
        old = func.now() - timedelta(minutes=5)
        session.execute(update(Job).values(not_before=old))
        session.execute(update(Job).where(Job.id == rung).values(published_at=func.now()))

    with sessions() as session:
        assert jobs.overdue(session, "cpu", 60) == [rung]
        assert jobs.overdue(session, "gpu", 60) == []
        assert jobs.get(session, silent).state == "queued"


def test_pruning_takes_old_finished_routine_jobs_and_nothing_else(sessions: Sessions) -> None:
    old, fresh, running = add(sessions), add(sessions), add(sessions)
    with sessions.begin() as session:
        done = update(Job).values(state="succeeded")
        session.execute(done.where(Job.id == old).values(finished_at=func.now() - timedelta(days=2)))
        session.execute(done.where(Job.id == fresh).values(finished_at=func.now()))

    with sessions.begin() as session:
        assert jobs.prune(session, ("other",), older_than=timedelta(days=1)) == 0
        assert jobs.prune(session, ("test",), older_than=timedelta(days=1)) == 1

    with sessions() as session:
        assert set(session.scalars(select(Job.id))) == {fresh, running}


def test_cancelling_a_job_that_does_not_exist_is_not_found(sessions: Sessions) -> None:
    with sessions.begin() as session, pytest.raises(NotFound):
        jobs.request_cancel(session, uuid7())
