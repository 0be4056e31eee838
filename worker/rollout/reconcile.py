"""Keeps the engine's slots true to the deployment rows: loads what serves, frees what nobody wants any more."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.client import EngineRefused
from engine.messages import Status
from engine.sync_client import SyncEngineClient
from services.errors import Conflict
from services.store import deployments
from services.store.base import Sessions
from services.store.models import Artifact, Deployment, Evaluation, Job, Run
from worker.rollout.drafters import Drafters

UNFINISHED = ("queued", "running")
# Gateways poll their snapshot every second; only then do they stop naming the old digest.
GRACE_SECONDS = 3.0
# A request that arrives after the look at the references holds its slot to its end; loading must not wait for that.
UNLOAD_SECONDS = 5.0

log = structlog.get_logger()


class Claim(NamedTuple):
    """A project that serves a digest, under the generation that was read with it."""

    project_id: UUID
    generation: int


class Wanted(NamedTuple):
    """What deployments serve (and must be loaded) and what unfinished work may be using (and must not be freed)."""

    serving: dict[str, list[Claim]]
    in_use: set[str]
    # The base model each serving digest was trained on.
    bases: dict[str, str]


class Reconciler:
    """One engine's reconciliation. `step` raises EngineGone or SQLAlchemyError when a side is away; call it again."""

    def __init__(
        self,
        sessions: Sessions,
        client: SyncEngineClient,
        artifacts: Path,
        *,
        grace_seconds: float = GRACE_SECONDS,
        unload_seconds: float = UNLOAD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions = sessions
        self._client = client
        self._artifacts = artifacts
        self._grace_seconds = grace_seconds
        self._unload_seconds = unload_seconds
        self._clock = clock
        self._unwanted_since: dict[str, float] = {}
        self._epoch: int | None = None
        self._crowded: frozenset[str] = frozenset()
        self._foreign: frozenset[str] = frozenset()
        self._drafters = Drafters(sessions, client, artifacts, grace_seconds=grace_seconds, clock=clock)

    def step(self) -> None:
        """Read both sides, then free, then load; what only makes answers faster comes last."""
        status = self._client.status()
        with self._sessions() as session:
            wanted = read_wanted(session)
        self._free(status, wanted)
        self._load(status, wanted)
        if status.epoch != self._epoch:
            log.info("engine reached", epoch=status.epoch, base=status.base)
            self._drafters.restarted(status)
            self._epoch = status.epoch
        self._drafters.step(status, wanted.in_use)

    def _free(self, status: Status, wanted: Wanted) -> None:
        """Unload what has been unwanted for the grace and is read by nobody; pinned traffic keeps its digest."""
        now = self._clock()
        loaded = {slot.digest for slot in status.slots}
        unwanted = loaded - wanted.serving.keys() - wanted.in_use
        self._unwanted_since = {digest: self._unwanted_since.get(digest, now) for digest in unwanted}
        for slot in status.slots:
            since = self._unwanted_since.get(slot.digest)
            if since is None or slot.references or slot.state != "ready" or now - since < self._grace_seconds:
                continue
            try:
                self._client.unload_adapter(slot.digest, seconds=self._unload_seconds)
            except TimeoutError:
                log.info("adapter still read; it is freed when its last request ends", digest=slot.digest)
            except EngineRefused as error:
                log.warning("cannot unload", digest=slot.digest, error=str(error))
            else:
                log.info("adapter unloaded", digest=slot.digest)

    def _load(self, status: Status, wanted: Wanted) -> None:
        """Load what is missing, but never so much that the engine would evict one serving adapter for another."""
        present = {slot.digest for slot in status.slots}
        foreign = frozenset(digest for digest, base in wanted.bases.items() if base != status.base)
        self._report_foreign(foreign, status.base)
        missing = [digest for digest in sorted(wanted.serving) if digest not in present | foreign]
        room = max(0, status.slots_total - 1 - len(present & (wanted.serving.keys() | wanted.in_use)))
        self._report_crowding(frozenset(missing[room:]))
        for digest in missing[:room]:
            try:
                self._client.load_adapter(digest, str(self._artifacts / digest))
            except EngineRefused as error:
                if error.transient:
                    log.warning("adapter cannot be loaded now", digest=digest, error=str(error))
                    continue
                for claim in wanted.serving[digest]:
                    self._retreat(claim, digest, str(error))
            else:
                log.info("adapter loaded", digest=digest)

    def _report_crowding(self, left_out: frozenset[str]) -> None:
        """Too few slots is no fault of the artefact: those projects are loaded when a gateway asks, not rolled back."""
        if left_out and left_out != self._crowded:
            log.error("more adapters deployed than slots", alarm=True, left_out=sorted(left_out))
        self._crowded = left_out

    def _report_foreign(self, foreign: frozenset[str], base: str) -> None:
        """An engine started with another model is no fault of the artefacts: they serve again when it is put right."""
        if foreign and foreign != self._foreign:
            log.error("deployed adapters of another base model", alarm=True, digests=sorted(foreign), engine_base=base)
        self._foreign = foreign

    def _retreat(self, claim: Claim, digest: str, error: str) -> None:
        """A deployed artefact that cannot be loaded serves nobody: go back to the last good one, else to the base."""
        try:
            with self._sessions.begin() as session:
                after = deployments.roll_back(
                    session,
                    claim.project_id,
                    actor="dispatcher",
                    reason=f"the engine refused {digest[:12]}: {error}",
                    expected_generation=claim.generation,
                    condemned_state="quarantined",
                )
        except Conflict as conflict:
            log.info("somebody else has changed the deployment", project=str(claim.project_id), error=str(conflict))
            return
        log.error(
            "a deployed adapter cannot be loaded; rolled back",
            alarm=True,
            project=str(claim.project_id),
            digest=digest,
            now_serves=after.active_digest or "the base",
            error=error,
        )


def read_wanted(session: Session) -> Wanted:
    """Active digests with their claims; candidates of unfinished runs, digests of unfinished jobs, their baselines."""
    serving: dict[str, list[Claim]] = {}
    bases: dict[str, str] = {}
    for row in session.execute(
        select(Deployment.project_id, Deployment.generation, Artifact.digest, Artifact.base_digest).join(
            Artifact, Artifact.digest == Deployment.active_digest
        )
    ):
        serving.setdefault(row.digest, []).append(Claim(row.project_id, row.generation))
        bases[row.digest] = row.base_digest
    candidates = select(Run.artifact_digest).where(Run.state.in_(UNFINISHED))
    deploying = select(Job.payload["digest"].as_string()).where(
        Job.state.in_(UNFINISHED), Job.payload.has_key("digest")
    )
    canaries = select(Deployment.canary_digest)
    baselines = (
        select(Evaluation.baseline_digest).join(Run, Run.id == Evaluation.run_id).where(Run.state.in_(UNFINISHED))
    )
    in_use = {digest for query in (candidates, deploying, canaries, baselines) for digest in session.scalars(query)}
    return Wanted(serving, {digest for digest in in_use if digest is not None}, bases)
