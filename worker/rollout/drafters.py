"""Keeps what drafts in the engine true to the deployment rows and to the log: heads in slots, answers in corpora."""

from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import structlog

from engine.client import EngineRefused
from engine.messages import Status
from engine.sync_client import SyncEngineClient
from services.errors import Conflict
from services.store import speculation_log
from services.store.base import Sessions
from services.store.speculators import Decision, WantedHeads, read_wanted_heads, retire_heads
from worker.rollout.speculator import condemn

# Most tokens that are read for a corpus, and the namespaces that the engine keeps.
CORPUS_TOKENS = 1 << 20
MOST_NAMESPACES = 64
# One message's tokens: the engine learns between two steps, and a step must not wait for a million.
CHUNK_TOKENS = 16_384

log = structlog.get_logger()


class Drafters:
    """The drafting half of one engine's reconciliation; the same thread, session factory and client as the rest."""

    def __init__(
        self,
        sessions: Sessions,
        client: SyncEngineClient,
        artifacts: Path,
        *,
        grace_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._client = client
        self._artifacts = artifacts
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._unwanted_since: dict[str, float] = {}
        self._crowded: frozenset[str] = frozenset()
        # Heads that fit no slot of this engine process; another one may have larger slots.
        self._too_large: set[str] = set()
        self._to_refill: deque[tuple[UUID, str]] = deque()
        self._began = datetime.now(UTC)

    def restarted(self, status: Status) -> None:
        """Another engine process answers: what it has not seen itself, it must be told."""
        self._began = datetime.now(UTC) - timedelta(seconds=status.uptime_seconds)
        self._too_large.clear()
        with self._sessions() as session:
            recent = speculation_log.recent_namespaces(session, MOST_NAMESPACES)
        # The last one learnt is the last one the engine would give up.
        self._to_refill = deque(reversed(recent)) if status.speculators_total else deque()

    def step(self, status: Status, in_use: set[str]) -> None:
        """Free and load heads, and refill one corpus: loading adapters must not wait for all of them."""
        if not status.speculators_total:
            return
        with self._sessions() as session:
            wanted = read_wanted_heads(session)
        self._retire_foreign(status, wanted)
        self._free(status, wanted, in_use)
        self._load(status, wanted, in_use)
        if self._to_refill:
            project_id, namespace = self._to_refill[0]
            self._refill(status, project_id, namespace)
            self._to_refill.popleft()

    def _retire_foreign(self, status: Status, wanted: WantedHeads) -> None:
        """Heads of another base never draft here, and while a deployment names them none are trained for this one."""
        for digest, project_id in wanted.projects.items():
            if wanted.bases[digest] == status.base:
                continue
            decision = Decision("dispatcher", f"heads {digest[:12]} read another base model than the one served", {})
            try:
                with self._sessions.begin() as session:
                    retire_heads(session, project_id, digest, decision)
            except Conflict as conflict:
                log.info("somebody else has changed the heads", project=str(project_id), error=conflict.message)
            else:
                log.warning("heads of another base model retired", project=str(project_id), digest=digest)

    def _free(self, status: Status, wanted: WantedHeads, in_use: set[str]) -> None:
        """Unload what nobody has asked for during the grace; requests that still name it go on without."""
        now = self._clock()
        unwanted = {slot.digest for slot in status.speculators} - wanted.projects.keys() - in_use
        self._unwanted_since = {digest: self._unwanted_since.get(digest, now) for digest in unwanted}
        for digest, since in self._unwanted_since.items():
            if now - since < self._grace_seconds:
                continue
            try:
                self._client.unload_speculator(digest)
            except EngineRefused as error:
                log.warning("cannot unload heads", digest=digest, error=str(error))
            else:
                log.info("heads unloaded", digest=digest)

    def _load(self, status: Status, wanted: WantedHeads, in_use: set[str]) -> None:
        """Load what is missing, but never so much that the engine would evict one project's heads for another's."""
        present = {slot.digest for slot in status.speculators}
        ours = [digest for digest in sorted(wanted.projects) if wanted.bases[digest] == status.base]
        missing = [digest for digest in ours if digest not in present | self._too_large]
        room = max(0, status.speculators_total - len(present & (wanted.projects.keys() | in_use)))
        self._report_crowding(frozenset(missing[room:]))
        for digest in missing[:room]:
            self._load_one(digest, wanted.projects[digest])

    def _load_one(self, digest: str, project_id: UUID) -> None:
        try:
            serving = self._client.load_speculator(digest, str(self._artifacts / digest))
        except EngineRefused as error:
            if error.transient:
                log.warning("heads cannot be loaded now", digest=digest, error=str(error))
            elif error.code == "too_large":
                self._too_large.add(digest)
                log.error("deployed heads fit no slot of the engine", alarm=True, digest=digest, error=str(error))
            else:
                self._retreat(project_id, digest, str(error))
            return
        if serving == digest:
            log.info("heads loaded", digest=digest)
        else:
            log.error("the engine drafts with other heads than asked", alarm=True, asked=digest, serving=serving)

    def _report_crowding(self, left_out: frozenset[str]) -> None:
        """Too few slots is no fault of the heads: their projects draft with the suffix drafter meanwhile."""
        if left_out and left_out != self._crowded:
            log.error("more heads deployed than slots", alarm=True, left_out=sorted(left_out))
        self._crowded = left_out

    def _retreat(self, project_id: UUID, digest: str, error: str) -> None:
        try:
            with self._sessions.begin() as session:
                condemn(session, project_id, digest, "dispatcher", f"the engine refused {digest[:12]}: {error}")
        except Conflict as conflict:
            log.info("somebody else has changed the heads", project=str(project_id), error=conflict.message)
            return
        log.error("deployed heads cannot be loaded", alarm=True, project=str(project_id), digest=digest, error=error)

    def _refill(self, status: Status, project_id: UUID, namespace: str) -> None:
        """The newest answers from before the engine's start, unless it holds as many tokens already: then another
        dispatcher has told it."""
        # More than a corpus holds would never be held, and told again and again.
        most = min(CORPUS_TOKENS, status.corpus_capacity)
        with self._sessions() as session:
            responses = speculation_log.responses(
                session, project_id, namespace, base=status.base, until=self._began, most=most
            )
        tokens = sum(map(len, responses))
        held = next((corpus.tokens for corpus in status.corpora if corpus.namespace == namespace), 0)
        if held >= tokens or not responses:
            return
        try:
            for chunk in _chunks([response.tolist() for response in responses]):
                self._client.learn(namespace, chunk)
        except EngineRefused as error:
            log.warning("the engine does not learn past answers", namespace=namespace, error=str(error))
        else:
            log.info("suffix corpus refilled", namespace=namespace, answers=len(responses), tokens=tokens)


def _chunks(responses: list[list[int]]) -> Iterator[list[list[int]]]:
    chunk: list[list[int]] = []
    size = 0
    for response in responses:
        chunk.append(response)
        size += len(response)
        if size >= CHUNK_TOKENS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
