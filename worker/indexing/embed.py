"""Makes the vectors that search by meaning reads: a project's newest live answers through the engine, batch by batch.

At batch priority, so that people's requests go first; a job ends after so many answers, and the schedule starts the
next, so that no worker is held for long.
"""

from collections.abc import Sequence
from uuid import UUID, uuid4

import numpy as np
import structlog

from engine.client import EngineGone, PoolFailed
from engine.messages import Pool, Pooling
from engine.sync_client import SyncEngineClient
from engine.text.pooling import search_model, vector_rules
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import embeddings
from services.store.embeddings import Due
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import Project

BATCH = 64
ANSWERS = 2048
# The beginning of a text says what it is about; a long one would hold up the others.
TOKENS = 256
CONNECT_SECONDS = 10.0

log = structlog.get_logger()


def embed_job(lease: Lease, settings: Settings) -> None:
    """Handler of "search.embed". An engine that is away is tried again later, by the schedule."""
    project_id = UUID(lease.payload["project_id"])
    try:
        how = vector_rules(settings.model_path).for_search()
    except ValueError as error:
        raise JobFailed(str(error)) from error
    tokenizer = Tokenizer.load(settings.model_path)
    made = 0
    try:
        with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
            model = search_model(client.status().base, how)
            while made < ANSWERS:
                count = _batch(lease, client, tokenizer, project_id, model, how)
                if count == 0:
                    break
                made += count
            _let_go(lease, project_id, model)
    except EngineGone as error:
        raise JobFailed(f"the engine is away: {error}") from error
    log.info("answers embedded", project_id=str(project_id), answers=made)


def _batch(
    lease: Lease, client: SyncEngineClient, tokenizer: Tokenizer, project_id: UUID, model: str, how: Pooling
) -> int:
    if lease.cancelled():
        raise JobCancelled
    with lease.sessions() as session:
        project = session.get(Project, project_id)
        keep = embeddings.kept(project) if project else 0
        batch = embeddings.due(session, project_id, model, keep, limit=BATCH) if keep else []
    if not batch:
        return 0
    vectors = _vectors(client, tokenizer, project_id, batch, how)
    with lease.transaction() as session:
        embeddings.add(session, project_id, model, vectors)
    return len(batch)


def _vectors(
    client: SyncEngineClient, tokenizer: Tokenizer, project_id: UUID, batch: Sequence[Due], how: Pooling
) -> dict[UUID, list[float]]:
    messages = [
        Pool(
            id=uuid4().hex, prompt=_ids(tokenizer, one.text), how=how, namespace=project_id.hex,
            cache_salt=project_id.hex, priority="batch", share="search",
        )
        for one in batch
    ]  # fmt: skip
    try:
        pooled = client.pool_many(messages)
    except PoolFailed as error:
        raise JobFailed(f"the engine makes no vectors: {error}") from error
    rows = np.stack([np.frombuffer(one.vector, dtype="<f4") for one in pooled])
    if not np.isfinite(rows).all():
        raise JobFailed("the engine gave a vector that is not finite")
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return {one.id: row for one, row in zip(batch, (rows / lengths).tolist(), strict=True)}


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Never nothing: an empty answer to an empty prompt is embedded as a blank."""
    return (tokenizer.encode(text, add_special_tokens=True) or tokenizer.encode(" "))[:TOKENS]


def _let_go(lease: Lease, project_id: UUID, model: str) -> None:
    with lease.transaction() as session:
        project = session.get(Project, project_id)
        if project is not None:
            embeddings.prune(session, project_id, model, embeddings.kept(project))
