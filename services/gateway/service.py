"""A running gateway: what its routes share, in the order it is started and stopped."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from engine.client import EngineClient
from engine.messages import Status
from engine.text.tokenizer import Tokenizer
from services.gateway.engine_link import SILENT_SECONDS, WEDGED_SECONDS, EngineLink
from services.gateway.generation import Parts
from services.gateway.log_spool import LogSpool
from services.gateway.metrics import Metrics
from services.gateway.snapshot import SnapshotKeeper
from services.settings import Settings
from services.store.base import Sessions, make_sessions
from services.store.keys import load_pepper

# Beyond this many seconds the snapshot is called stale: one poll and one reconnect have been missed.
STALE_SECONDS = 5.0

log = structlog.get_logger()


@dataclass
class Gateway:
    """Everything a request needs. `parts` exists between start and stop."""

    settings: Settings
    pepper: bytes
    tokenizer: Tokenizer
    sessions: Sessions
    keeper: SnapshotKeeper
    metrics: Metrics = field(default_factory=Metrics)
    parts: Parts | None = None

    @classmethod
    def build(cls, settings: Settings) -> "Gateway":
        """Read what must be there at start. Raises ValueError or OSError with a sentence when it is not."""
        sessions = make_sessions(settings.database_dsn)
        return cls(
            settings=settings,
            pepper=load_pepper(settings),
            tokenizer=Tokenizer.load(settings.model_path),
            sessions=sessions,
            keeper=SnapshotKeeper(sessions.kw["bind"]),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start what runs beside the requests; stop it in the opposite order."""
        settings = self.settings
        spool = LogSpool(settings.spool, budget_bytes=settings.spool_bytes, durability=settings.durability)
        link = EngineLink(EngineClient(settings.engine_socket), settings.artifacts)
        self.parts = Parts(self.tokenizer, link, spool, self.metrics)
        self.keeper.start()
        link.start()
        log.info("gateway_started", spool=str(spool.directory), engine=settings.engine_socket)
        try:
            yield
        finally:
            await link.close()
            self.keeper.stop()
            spool.close()
            self.sessions.kw["bind"].dispose()
            log.info("gateway_stopped")

    @property
    def live(self) -> Parts:
        """The parts, for a request: requests only arrive while it runs."""
        assert self.parts is not None, "the gateway is not running"
        return self.parts

    def health(self) -> dict[str, Any]:
        """What works. `status` is "ok", "degraded" (serves, but something is away) or "unavailable"."""
        link, spool, snapshot = self.live.link, self.live.spool, self.keeper.current
        engine, silence = link.known, link.silent_seconds
        stale = self.keeper.error is not None or snapshot.age_seconds > STALE_SECONDS
        serves = engine is not None and silence <= WEDGED_SECONDS and snapshot.usable and not spool.full
        impaired = stale or silence > SILENT_SECONDS
        return {
            "status": "unavailable" if not serves else "degraded" if impaired else "ok",
            "engine": _describe(engine, silence),
            "database": {
                "connected": not stale,
                "snapshot_age_seconds": round(snapshot.age_seconds, 2) if snapshot.keys or snapshot.projects else None,
            },
            "log": {"spool_bytes": spool.used_bytes, "full": spool.full, "durability": spool.durability},
        }


def _describe(engine: Status | None, silence: float) -> dict[str, Any]:
    if engine is None:
        return {"connected": False}
    return {
        "connected": True,
        "silent_seconds": round(silence, 2),
        "base": engine.base,
        "max_context": engine.max_context,
        "pid": engine.pid,
    }
