"""Keeps an engine's slots true to the deployment rows: loads what serves or is on trial, frees what nobody wants any
more, and says for each project which generation the engine has everything loaded for.

Every engine obeys the same rows by itself. A change of the row never waits for one: a gateway whose engine is behind
loads what it lacks when a request asks for it.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
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
from services.store import deployments, engine_reports, failpoints, rollouts
from services.store.base import Sessions
from services.store.engine_reports import Report
from services.store.models import Artifact, Deployment, Evaluation, Job, Run
from services.store.rollouts import Decision
from worker.rollout.drafters import Drafters

UNFINISHED = ("queued", "running")
# Gateways poll their snapshot every second; only then do they stop naming the old digest.
GRACE_SECONDS = 3.0
# How often an engine says that it is still there, when nothing changes.
SEEN_SECONDS = 5.0
# What an engine refused is tried again after so long: time for the other engines to say that they serve it.
AGAIN_SECONDS = 15.0
ACTOR = "dispatcher"
# A request that arrives after the look at the references holds its slot to its end; loading must not wait for that.
UNLOAD_SECONDS = 5.0

log = structlog.get_logger()


class Claim(NamedTuple):
    """A project that serves a digest, or tries it, under the generation that was read with it."""

    project_id: UUID
    generation: int
    on_trial: bool = False


class Wish(NamedTuple):
    """What one deployment wants loaded. `probe_until`: what it serves must be confirmed by then."""

    project_id: UUID
    generation: int
    active: str | None
    digests: frozenset[str]
    probe_until: datetime | None


class Wanted(NamedTuple):
    """What deployments serve or try (and must be loaded) and what unfinished work may use (and must not be freed)."""

    serving: dict[str, list[Claim]]
    in_use: set[str]
    # The base model each serving digest was trained on.
    bases: dict[str, str]
    wishes: list[Wish]


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
        engine: str = "engine",
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
        # When what this engine refused is tried again, and what of it another engine serves.
        self._again: dict[str, float] = {}
        self._left_out: set[str] = set()
        self._engine = engine
        self._reported: dict[UUID, Report] = {}
        self._said = float("-inf")
        self._drafters = Drafters(sessions, client, artifacts, grace_seconds=grace_seconds, clock=clock)

    def step(self) -> None:
        """Read both sides, then free, then load; what only makes answers faster comes last."""
        status = self._client.status()
        with self._sessions() as session:
            wanted = read_wanted(session)
        self._free(status, wanted)
        ready = self._load(status, wanted)
        failpoints.reach("reconcile.loaded")
        self._report(status.epoch, wanted, ready)
        self._settle_probes(wanted, ready)
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

    def _load(self, status: Status, wanted: Wanted) -> set[str]:
        """Load what is missing, but never so much that the engine would evict one serving adapter for another.

        Returns what can serve now.
        """
        present = {slot.digest for slot in status.slots}
        foreign = frozenset(digest for digest, base in wanted.bases.items() if base != status.base)
        self._report_foreign(foreign, status.base)
        ready = {slot.digest for slot in status.slots if slot.state == "ready"}
        # A candidate waits for what serves everybody else.
        order = sorted(wanted.serving, key=lambda digest: (all(c.on_trial for c in wanted.serving[digest]), digest))
        missing = [digest for digest in order if digest not in present | foreign and not self._waits(digest)]
        room = max(0, status.slots_total - 1 - len(present & (wanted.serving.keys() | wanted.in_use)))
        self._report_crowding(frozenset(missing[room:]))
        for digest in missing[:room]:
            try:
                self._client.load_adapter(digest, str(self._artifacts / digest))
            except EngineRefused as error:
                if error.transient:
                    log.warning("adapter cannot be loaded now", digest=digest, error=str(error))
                    continue
                self._refused(digest, wanted.serving[digest], str(error))
            else:
                ready.add(digest)
                log.info("adapter loaded", digest=digest)
        self._again = {digest: at for digest, at in self._again.items() if digest in wanted.serving.keys() - ready}
        self._left_out &= self._again.keys()
        return ready

    def _waits(self, digest: str) -> bool:
        return self._clock() < self._again.get(digest, float("-inf"))

    def _refused(self, digest: str, claims: list[Claim], error: str) -> None:
        """Condemn it, unless another engine serves it: then this one is at fault (other limits, an unreadable disk) and
        is left out. Others that are there may not have said so yet, so where there are any it takes two refusals."""
        with self._sessions() as session:
            projects = {claim.project_id for claim in claims}
            others = [one for project in projects for one in engine_reports.others(session, project, self._engine)]
        tried_before = digest in self._again
        self._again[digest] = self._clock() + AGAIN_SECONDS
        serving = sorted({other.engine for other in others if digest in other.digests})
        if serving:
            if digest not in self._left_out:
                told = {"engine": self._engine, "digest": digest, "served_by": serving, "error": error}
                log.error("an engine cannot load what another serves; it is left out", alarm=True, **told)
            self._left_out.add(digest)
        elif others and not tried_before:
            log.warning("adapter refused; asking again once the other engines have had their turn", digest=digest)
        else:
            for claim in claims:
                self._retreat(claim, digest, f"the engine refused {digest[:12]}: {error}", "quarantined")

    def _report(self, epoch: int, wanted: Wanted, ready: set[str]) -> None:
        """Tell the database what this engine has for whom: at once where it changed, else every few seconds."""
        if self._epoch != epoch:
            self._reported = {}
        found = {}
        for wish in wanted.wishes:
            known = self._reported.get(wish.project_id)
            generation = wish.generation if wish.digests <= ready else known.generation if known else 0
            found[wish.project_id] = Report(wish.project_id, generation, tuple(sorted(wish.digests & ready)))
        changed = [report for project, report in found.items() if self._reported.get(project) != report]
        if not changed and self._clock() - self._said < SEEN_SECONDS:
            return
        with self._sessions.begin() as session:
            engine_reports.put(session, self._engine, epoch, changed)
            engine_reports.seen(session, self._engine)
        self._reported, self._said = found, self._clock()

    def _settle_probes(self, wanted: Wanted, ready: set[str]) -> None:
        """What went live is confirmed by an engine that serves it; unconfirmed at its deadline it is rolled back.

        Only an engine that is there says so: one that is dead obeys the row when it is back.
        """
        for wish in wanted.wishes:
            if wish.probe_until is None or wish.active is None:
                continue
            if wish.active in ready:
                with self._sessions.begin() as session:
                    deployments.confirm(session, wish.project_id, wish.generation)
                failpoints.reach("probe.confirmed")
            elif datetime.now(UTC) > wish.probe_until and not self._excused(wish.active):
                reason = f"no engine could load {wish.active[:12]} by the deadline: unconfirmed"
                self._retreat(Claim(wish.project_id, wish.generation), wish.active, reason, "rolled_back")

    def _excused(self, digest: str) -> bool:
        """Whether it is for no fault of the artefact that this engine does not serve it."""
        return digest in self._crowded | self._foreign | self._left_out

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

    def _retreat(self, claim: Claim, digest: str, reason: str, state: str) -> None:
        """A deployed artefact that cannot be loaded serves nobody: go back to the last good one, else to the base.

        A candidate that cannot be loaded only goes off trial.
        """
        try:
            with self._sessions.begin() as session:
                if claim.on_trial:
                    decision = Decision(ACTOR, reason, {"engine": self._engine}, claim.generation)
                    after = rollouts.end(session, claim.project_id, state, decision, automatic=True)
                else:
                    after = deployments.roll_back(
                        session,
                        claim.project_id,
                        actor=ACTOR,
                        reason=reason,
                        expected_generation=claim.generation,
                        condemned_state=state,
                        automatic=True,
                        evidence={"engine": self._engine},
                    )
                failpoints.reach("reconcile.retreating")
        except Conflict as conflict:
            log.info("somebody else has changed the deployment", project=str(claim.project_id), error=str(conflict))
            return
        log.error(
            "a deployed adapter cannot be loaded; rolled back",
            alarm=True,
            project=str(claim.project_id),
            digest=digest,
            now_serves=after.active_digest or "the base",
            error=reason,
        )


def read_wanted(session: Session) -> Wanted:
    """Digests that serve or are on trial with their claims; candidates of unfinished runs, digests of unfinished jobs,
    their baselines."""
    serving: dict[str, list[Claim]] = {}
    bases: dict[str, str] = {}
    wishes = []
    for one in session.scalars(select(Deployment).order_by(Deployment.project_id)):
        named = frozenset(digest for digest in (one.active_digest, one.canary_digest) if digest)
        wishes.append(Wish(one.project_id, one.generation, one.active_digest, named, one.probe_until))
    for row in session.execute(
        select(Deployment.project_id, Deployment.generation, Deployment.canary_digest, Artifact).join(
            Artifact, Artifact.digest.in_((Deployment.active_digest, Deployment.canary_digest))
        )
    ):
        digest, on_trial = row.Artifact.digest, row.Artifact.digest == row.canary_digest
        serving.setdefault(digest, []).append(Claim(row.project_id, row.generation, on_trial))
        bases[digest] = row.Artifact.base_digest
    candidates = select(Run.artifact_digest).where(Run.state.in_(UNFINISHED))
    deploying = select(Job.payload["digest"].as_string()).where(
        Job.state.in_(UNFINISHED), Job.payload.has_key("digest")
    )
    baselines = (
        select(Evaluation.baseline_digest).join(Run, Run.id == Evaluation.run_id).where(Run.state.in_(UNFINISHED))
    )
    in_use = {digest for query in (candidates, deploying, baselines) for digest in session.scalars(query)}
    return Wanted(serving, {digest for digest in in_use if digest is not None}, bases, wishes)
