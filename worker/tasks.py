"""The Celery app: one task that takes a job id, claims the job in the ledger, runs its handler, records the ending.

Messages carry nothing but the id and may be lost, doubled or late: the ledger decides who works on what.
"""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from uuid import UUID

import structlog
from celery import Celery
from sqlalchemy.exc import DBAPIError

from services.settings import Settings
from services.store import failpoints, jobs
from services.store.base import Sessions, make_sessions
from services.store.jobs import JobCancelled, JobFailed, JobWaits, Lease, LostLease
from worker import logs
from worker.curation.build import build_job
from worker.curation.bulk import bulk_job
from worker.curation.embed import embed_job as embed_examples_job
from worker.curation.sample import sample_job
from worker.erasure.job import erase_job
from worker.gate.evaluate import evaluate_job
from worker.gate.speculator_job import evaluate_speculator_job
from worker.hooks.deliver import deliver_job as deliver_webhook_job
from worker.indexing.embed import embed_job
from worker.rollout.pins import check_pins_job
from worker.rollout.shadow import shadow_job
from worker.rollout.speculator import deploy_speculator_job
from worker.rollout.swap import deploy_job
from worker.training.run import train_job
from worker.training.speculator import speculator_job

Handler = Callable[[Lease, Settings], None]

TASK = "whet.work"
PUBLISH_SECONDS = 2.0
# Which of the two reaches a pool process depends on the way Celery's shutdown takes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGQUIT)
# A finished job is worth waiting for: while Postgres is away its ending is tried again for this long.
ENDING_SECONDS = 900.0

log = structlog.get_logger()


class WorkerStopping(SystemExit):
    """Raised inside a handler by the pool process's SIGTERM, to unwind it."""


def heartbeat(_lease: Lease, _settings: Settings) -> None:
    """Being claimed and finished is all the dispatcher wants to see."""


HANDLERS: Mapping[str, Handler] = {
    "heartbeat": heartbeat,
    "review.sample": sample_job,
    "interactions.bulk": bulk_job,
    "search.embed": embed_job,
    "dataset.build": build_job,
    "train": train_job,
    "evaluate": evaluate_job,
    "deploy": deploy_job,
    "shadow": shadow_job,
    "train.speculator": speculator_job,
    "evaluate.speculator": evaluate_speculator_job,
    "deploy.speculator": deploy_speculator_job,
    "pins.check": check_pins_job,
    "examples.embed": embed_examples_job,
    "erase": erase_job,
    "webhook.deliver": deliver_webhook_job,
}


def make_app(settings: Settings, *, handlers: Mapping[str, Handler] = HANDLERS) -> Celery:
    """An app for consuming and for ringing; every blocking call on Redis is bounded."""
    app = Celery("whet", broker=settings.redis_dsn, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=PUBLISH_SECONDS,
        broker_transport_options={
            "socket_timeout": PUBLISH_SECONDS,
            "socket_connect_timeout": PUBLISH_SECONDS,
            "health_check_interval": 10,
        },
    )
    state: dict[str, Sessions] = {}

    def work(job_id: str) -> None:
        # Neither connections nor signal handlers survive the way to a pool process, so the first job there makes them.
        if "sessions" not in state:
            _unwind_on_stop()
            state["sessions"] = make_sessions(settings.database_dsn, pool_size=3)
        perform(state["sessions"], settings, UUID(job_id), handlers=handlers)

    app.task(name=TASK)(work)
    return app


def _unwind_on_stop() -> None:
    """A stopping worker unwinds the running handler, so that it ends its children and its lease is handed back."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        # Celery's shutdown may signal twice, and the second must not interrupt the unwinding.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise WorkerStopping(0)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def ring(app: Celery, job_id: UUID, queue: str) -> None:
    """Tell the workers of `queue` that a job is due. Raises kombu's OperationalError within about two seconds."""
    app.send_task(TASK, args=[str(job_id)], queue=queue, retry=False, ignore_result=True)


def perform(
    sessions: Sessions, settings: Settings, job_id: UUID, *, handlers: Mapping[str, Handler] = HANDLERS
) -> None:
    """Claim one job, run it and record how it ended. A job that is not to be had is no error: the bell rang twice."""
    lease = jobs.claim(sessions, job_id, worker_name())
    if lease is None:
        return
    with lease, structlog.contextvars.bound_contextvars(job=str(job_id), kind=lease.kind, attempt=lease.attempt):
        logs.recent.clear()
        failpoints.reach("job.claimed")
        try:
            _record(_run(lease, settings, handlers))
        except LostLease as error:
            log.warning("the job was taken away", error=str(error))


def _run(lease: Lease, settings: Settings, handlers: Mapping[str, Handler]) -> Callable[[], None]:
    """Run the handler; returns how the ledger is to record the outcome. Raises LostLease."""
    log.info("job started")
    try:
        handler = handlers.get(lease.kind)
        if handler is None:
            raise JobFailed(f"this worker knows no job of kind {lease.kind!r}")
        handler(lease, settings)
    except LostLease:
        raise
    except JobCancelled:
        log.info("job cancelled")
        return lease.cancel
    except JobFailed as error:
        reason = str(error)
        log.warning("job failed for good", error=reason)
        return lambda: lease.fail(reason, "\n".join(logs.recent), retry=False)
    except JobWaits as error:
        waits_for = str(error)
        log.warning("job waits", error=waits_for)
        return lambda: lease.wait(waits_for, "\n".join(logs.recent))
    except WorkerStopping:
        # Another worker may go on at once, and the attempt does not count.
        lease.release()
        raise
    except Exception as error:
        log.exception("job failed")
        reason, tail = f"{type(error).__name__}: {error}", "\n".join([*logs.recent, traceback.format_exc()])
        return lambda: lease.fail(reason, tail)
    failpoints.reach("job.handled")
    return lambda: _succeed(lease)


def _succeed(lease: Lease) -> None:
    """Many handlers end their job together with their last effect."""
    if not lease.ended():
        lease.succeed()


def _record(ending: Callable[[], object]) -> None:
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            ending()
        except DBAPIError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("cannot record the ending yet", error=str(error))
            time.sleep(1.0)
        else:
            log.info("job ended")
            return


def worker_name() -> str:
    """Who holds a lease, for people reading the ledger and for the watchdog."""
    return f"{socket.gethostname()}:{os.getpid()}"
