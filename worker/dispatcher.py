"""The dispatcher: rings for due jobs, expires leases, schedules, and keeps the engine loaded with what is deployed.

One leader at a time, by an advisory lock on the connection that also listens for new jobs: when that connection dies,
so does the leadership. Everything it does is idempotent or a compare-and-set, so a moment with two leaders is harmless.
"""

import hashlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType

import psycopg
import structlog
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy.exc import SQLAlchemyError

from engine.client import EngineGone
from engine.sync_client import SyncEngineClient
from services.settings import Settings
from services.store import erasure, jobs, partitions, runs, webhook_deliveries, worked
from services.store.base import Sessions, make_sessions
from worker import cadence, logs, schedule
from worker.rollout.collect import collect_orphans
from worker.rollout.reconcile import Reconciler
from worker.rollout.trial import Trials
from worker.rollout.watch import Watch
from worker.tasks import make_app, ring
from worker.training import workspace

LEADER_LOCK = 0x77686574_64697370  # Any fixed number; this one spells "whetdisp".
TICK_SECONDS = 1.0
# A busy queue may leave a job unclaimed for long, and every ring adds a message that a worker must read.
REPUBLISH_SECONDS = 30.0
# After an outage of Postgres every lease looks expired, until the workers' heartbeats have had their turn.
PATIENCE_SECONDS = 20.0
HEARTBEAT_SECONDS = 60.0
SCHEDULE_SECONDS = 5.0
HEADS_SECONDS = 15.0
TRAININGS_SECONDS = 15.0
TRIALS_SECONDS = 3.0
WORKSPACES_SECONDS = 60.0
HOUSEKEEPING_SECONDS = 3600.0

log = structlog.get_logger()


class Every:
    """True after `first` seconds and then every `seconds`; `restart` begins anew."""

    def __init__(self, seconds: float, *, first: float = 0.0) -> None:
        self._seconds = seconds
        self._first = first
        self.restart()

    def restart(self) -> None:
        self._next = time.monotonic() + self._first

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


class Dispatcher:
    """One process's dispatcher; `run` returns after `stop`."""

    def __init__(
        self,
        settings: Settings,
        *,
        republish_seconds: float = REPUBLISH_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._settings = settings
        self._sessions: Sessions = make_sessions(settings.database_dsn, pool_size=3)
        self._app = make_app(settings)
        self._republish_seconds = republish_seconds
        self._sampler = schedule.Sampler()
        self._indexer = schedule.Indexer()
        self._watch = Watch()
        self._trials = Trials()
        self._cadence = schedule.SpeculatorCadence()
        self._runs = cadence.TrainCadence()
        self._stopped = threading.Event()
        self._leading = threading.Event()
        self._failed = False
        self._foreign_artifacts: set[str] = set()
        self._expiry = Every(0.0, first=patience_seconds)
        self._heartbeat = Every(HEARTBEAT_SECONDS)
        self._schedule = Every(SCHEDULE_SECONDS)
        self._heads = Every(HEADS_SECONDS)
        self._trainings = Every(TRAININGS_SECONDS)
        self._trial = Every(TRIALS_SECONDS)
        self._workspaces = Every(WORKSPACES_SECONDS)
        self._housekeeping = Every(HOUSEKEEPING_SECONDS)
        self._timers = (
            self._expiry, self._heartbeat, self._schedule, self._heads, self._trainings, self._trial,
            self._workspaces, self._housekeeping,
        )  # fmt: skip

    def stop(self) -> None:
        """Finish the current tick and return from `run`."""
        self._stopped.set()

    def run(self) -> None:
        """Wait for the leadership, lead, and start over when Postgres goes away, until stopped.

        Raises RuntimeError when a reconciling thread met a bug: a fresh process is better than half of one.
        """
        reconcilers = self._start_reconcilers(self._settings.engine_sockets)
        while not self._stopped.is_set():
            try:
                with self._leadership() as connection:
                    self._lead(connection)
            except (psycopg.Error, SQLAlchemyError) as error:
                log.warning("Postgres is away; trying again", error=str(error).strip())
                self._stopped.wait(1.0)
        for thread in reconcilers:
            thread.join(timeout=5.0)
        log.info("dispatcher stopped")
        if self._failed:
            raise RuntimeError("the reconciliation failed; see the log")

    @contextmanager
    def _leadership(self) -> Iterator[psycopg.Connection]:
        """A connection that holds the leader lock and listens. Waits for both; gives up silently when stopped."""
        dsn = self._settings.database_dsn.replace("postgresql+psycopg://", "postgresql://", 1)
        with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
            connection.execute("LISTEN whet_job")
            while not self._stopped.is_set() and not _try_lock(connection):
                self._stopped.wait(TICK_SECONDS)
            if not self._stopped.is_set():
                log.info("dispatcher leads")
                for timer in self._timers:
                    timer.restart()
                self._leading.set()
            try:
                yield connection
            finally:
                self._leading.clear()

    def _lead(self, connection: psycopg.Connection) -> None:
        while not self._stopped.is_set():
            self._tick()
            # Returns at the first notification, or after the tick; raises when the connection is gone.
            for _ in connection.notifies(timeout=TICK_SECONDS, stop_after=1):
                pass

    def _tick(self) -> None:
        if self._expiry.due():
            with self._sessions.begin() as session:
                for job_id in jobs.expire(session):
                    log.warning("lease expired", job=str(job_id))
        with self._sessions.begin() as session:
            for run in runs.settle(session):
                log.warning("run ended with its job", run=str(run.id), state=run.state)
            for request_id in erasure.settle(session):
                log.error("an erasure has failed", alarm=True, erasure=str(request_id))
        if self._heartbeat.due():
            self._transact(schedule.heartbeat)
        if self._schedule.due():
            with self._sessions.begin() as session:
                self._sampler.step(session, datetime.now(UTC))
                self._indexer.step(session, datetime.now(UTC))
                worked.ring_where_due(session, datetime.now(UTC))
            self._transact(webhook_deliveries.settle)
        if self._settings.speculation and self._heads.due():
            self._watch.step(self._sessions, datetime.now(UTC))
            with self._sessions.begin() as session:
                self._cadence.step(session, datetime.now(UTC), self._watch.drifted)
        if self._trainings.due():
            with self._sessions.begin() as session:
                self._runs.step(session, datetime.now(UTC))
        if self._trial.due():
            self._trials.step(self._sessions, datetime.now(UTC))
        if self._workspaces.due():
            self._sweep_workspaces()
        if self._housekeeping.due():
            self._transact(partitions.ensure)
            self._transact(schedule.prune)
            self._transact(webhook_deliveries.prune)
            with self._sessions() as session:
                collect_orphans(session, self._settings.artifacts, warned=self._foreign_artifacts)
        self._publish()

    def _transact(self, step: Callable[..., object]) -> None:
        with self._sessions.begin() as session:
            step(session)

    def _sweep_workspaces(self) -> None:
        """What a run read goes with it, also where it ended without its worker: dead, or cancelled between attempts."""
        try:
            with self._sessions() as session:
                gone = workspace.sweep_finished(session, self._settings.home)
        except OSError as error:
            log.warning("cannot sweep the work directories", error=str(error))
            return
        if gone:
            log.info("work directories of runs that are over removed", runs=gone)

    def _publish(self) -> None:
        with self._sessions.begin() as session:
            due = jobs.take_due(session, republish_seconds=self._republish_seconds)
        for position, publication in enumerate(due):
            try:
                ring(self._app, publication.job_id, publication.queue)
            except (BrokerError, OSError) as error:
                log.warning("Redis is away; jobs wait in the ledger", error=str(error), waiting=len(due) - position)
                with self._sessions.begin() as session:
                    jobs.unpublish(session, [missed.job_id for missed in due[position:]])
                return

    def _start_reconcilers(self, addresses: Sequence[str]) -> list[threading.Thread]:
        """One thread for each engine, because loading an adapter may take seconds that nobody else should wait."""
        threads = [
            threading.Thread(target=self._reconcile_or_stop, args=(address,), name="reconcile", daemon=True)
            for address in addresses
        ]
        for thread in threads:
            thread.start()
        return threads

    def _reconcile_or_stop(self, address: str) -> None:
        try:
            self._reconcile(address)
        except Exception:
            log.exception("reconciliation failed")
            self._failed = True
            self.stop()

    def _reconcile(self, address: str) -> None:
        """Only the leader's: an engine on another machine gets what it lacks from the gateway that asks it."""
        name = engine_name(address)
        with SyncEngineClient(address, connect_seconds=1.0) as client:
            reconciler = Reconciler(self._sessions, client, self._settings.artifacts, engine=name)
            reachable = True
            while not self._stopped.wait(TICK_SECONDS):
                if not self._leading.is_set():
                    continue
                try:
                    reconciler.step()
                except (EngineGone, SQLAlchemyError) as error:
                    if reachable:
                        log.warning("cannot reconcile the engine now", error=str(error).strip())
                    reachable = False
                else:
                    reachable = True


def engine_name(address: str) -> str:
    """How reports name an engine: its machine and its address, without the paths of the machine."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:6]
    return f"{socket.gethostname()}/{digest}"


def _try_lock(connection: psycopg.Connection) -> bool:
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", (LEADER_LOCK,)).fetchone()
    return bool(row and row[0])


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = Settings()
    logs.configure(settings.log_level)
    dispatcher = Dispatcher(settings)

    def stop(_number: int, _frame: FrameType | None) -> None:
        dispatcher.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    dispatcher.run()


if __name__ == "__main__":
    main()
