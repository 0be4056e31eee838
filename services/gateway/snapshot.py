"""What the gateway knows of keys, projects and deployments, held in memory so that no request waits on Postgres.

A thread reloads it on every NOTIFY and once a second. While Postgres is away the last snapshot serves on, and its age
is reported; after a day it is refused, because revocations can no longer be trusted to have arrived.
"""

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import structlog
from sqlalchemy import Connection, Engine, and_, select
from sqlalchemy.exc import SQLAlchemyError

from services.gateway import instant
from services.gateway.instant import Instant
from services.store.models import ApiKey, Artifact, Deployment, Project, Rollout
from services.store.speculation import Heads, SpeculationConfig, read_config

CHANNEL = "whet_snapshot"
POLL_SECONDS = 1.0
RETRY_SECONDS = 0.5
OLDEST_SECONDS = 24 * 3600.0
UNTRUSTED_STATES = ("quarantined",)

log = structlog.get_logger()


@dataclass(frozen=True)
class KnownKey:
    """A key that was neither revoked nor deleted when the snapshot was taken. `project_id` None: every project."""

    id: UUID
    prefix: str
    hash: bytes
    project_id: UUID | None
    scopes: frozenset[str]
    expires_at: datetime | None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


@dataclass(frozen=True)
class Trial:
    """A canary: the candidate, the share of users that it serves, and the salt that they are drawn with."""

    digest: str
    share: float
    salt: str


@dataclass(frozen=True)
class KnownProject:
    """A project, what it serves now, the adapters that `slug@digest` may pin, how it drafts, and what is on trial."""

    id: UUID
    slug: str
    created_at: datetime
    config: Mapping[str, Any]
    config_hash: str
    generation: int
    active: str | None
    last_good: str | None
    artifacts: frozenset[str]
    heads: Heads
    speculation: SpeculationConfig
    trial: Trial | None = None


@dataclass(frozen=True)
class Snapshot:
    """One consistent view. `taken` is on the monotonic clock."""

    keys: Mapping[str, KnownKey] = field(default_factory=dict)
    projects: Mapping[str, KnownProject] = field(default_factory=dict)
    instant: Instant = field(default_factory=Instant)
    taken: float = float("-inf")

    @property
    def age_seconds(self) -> float:
        """How old the knowledge is; infinite before the first load."""
        return time.monotonic() - self.taken

    @property
    def usable(self) -> bool:
        """Whether it may still decide who gets in."""
        return self.age_seconds < OLDEST_SECONDS


def load(connection: Connection, before: Snapshot | None = None) -> Snapshot:
    """A few short queries; `taken` is before the first, so that the age is never flattered. Texts that `before` holds
    are not read again."""
    taken = time.monotonic()
    keys = {
        row.prefix: KnownKey(row.id, row.prefix, row.hash, row.project_id, frozenset(row.scopes), row.expires_at)
        for row in connection.execute(select(ApiKey.__table__).where(ApiKey.revoked_at.is_(None)))
    }
    artifacts: dict[UUID, set[str]] = {}
    adapters = select(Artifact.project_id, Artifact.digest).where(
        Artifact.kind == "adapter", Artifact.state.not_in(UNTRUSTED_STATES)
    )
    for row in connection.execute(adapters):
        artifacts.setdefault(row.project_id, set()).add(row.digest)
    query = select(
        Project.id, Project.slug, Project.created_at, Project.config,
        Deployment.generation, Deployment.active_digest, Deployment.last_good_digest,
        Deployment.speculator_digest, Deployment.speculator_canary_digest, Deployment.speculator_share,
        Deployment.canary_share, Rollout.digest.label("trial"), Rollout.salt,
    ).outerjoin(Deployment, Deployment.project_id == Project.id).outerjoin(
        Rollout, and_(Rollout.project_id == Project.id, Rollout.stage == "canary")
    )  # fmt: skip
    projects = {
        row.slug: KnownProject(
            row.id, row.slug, row.created_at, row.config, hash_config(row.config),
            row.generation or 0, row.active_digest, row.last_good_digest, frozenset(artifacts.get(row.id, ())),
            Heads(row.speculator_digest, row.speculator_canary_digest, row.speculator_share or 0.0),
            read_config(row.config),
            Trial(row.trial, row.canary_share, row.salt) if row.trial is not None and row.canary_share else None,
        )
        for row in connection.execute(query)
    }  # fmt: skip
    return Snapshot(keys, projects, instant.load(connection, before.instant if before else Instant()), taken)


def hash_config(config: Mapping[str, Any]) -> str:
    """SHA-256 of a project's configuration in canonical form."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class SnapshotKeeper:
    """Keeps `current` fresh from a thread of its own. Readers take `current` once per request and use only that."""

    def __init__(self, engine: Engine) -> None:
        self.current = Snapshot()
        self.error: str | None = None
        self._engine = engine
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)

    def start(self) -> None:
        """Begin reloading."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when it has let go of its connection."""
        self._stopping.set()
        self._thread.join(timeout=POLL_SECONDS + 5)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._follow()
            except (SQLAlchemyError, psycopg.Error) as error:
                self._report(error)
                self._stopping.wait(RETRY_SECONDS)

    def _report(self, error: Exception) -> None:
        """Once per outage: a minute without Postgres must not fill the log."""
        if self.error is None:
            log.warning("snapshot_is_stale", error=str(error), age_seconds=round(self.current.age_seconds, 1))
        self.error = str(error)

    def _follow(self) -> None:
        """LISTEN before the first load, so that no change falls between the two."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
            driver.execute(f"LISTEN {CHANNEL}")
            try:
                while not self._stopping.is_set():
                    self.current = load(connection, self.current)
                    if self.error is not None:
                        log.info("snapshot_is_fresh_again")
                    self.error = None
                    for _ in driver.notifies(timeout=POLL_SECONDS, stop_after=1):
                        pass
            finally:
                # The pool must not hand a listening connection to a request.
                connection.invalidate()
