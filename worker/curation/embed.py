"""Makes the vectors of worked examples: corrections of the train split, embedded by the base model that serves.

Idempotent: what has a vector of this base and stands is left alone, what no longer stands loses it.
"""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import numpy as np
import structlog
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from engine.messages import Pool
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import examples, pii, pii_presidio, reviews
from services.store.copying import among
from services.store.examples import ERASED, is_erased
from services.store.jobs import Lease
from services.store.models import Annotation, Example, ExampleEmbedding, Project, ReviewItem
from services.store.worked import LONGEST_TEXT, MOST_EXAMPLES, read_tokens, shown_of
from worker.curation import judged
from worker.curation.judged import Judged
from worker.curation.pairs import Retired

CONNECT_SECONDS = 30.0
BATCH = 32

log = structlog.get_logger()


class Waiting(NamedTuple):
    """A correction that has no vector yet, and the judgements it rests on."""

    example_id: UUID
    shown: str
    completion: str
    annotation_ids: tuple[UUID, ...]


def embed_job(lease: Lease, settings: Settings) -> None:
    """Handler of "examples.embed"."""
    project_id = UUID(lease.payload["project_id"])
    tokenizer = Tokenizer.load(settings.model_path)
    with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
        base = client.status().base
        with lease.transaction() as session:
            _drop_stale(session, project_id, base)
            waiting = _draft(session, project_id)
        for start in range(0, len(waiting), BATCH):
            if lease.cancelled():
                return
            batch = waiting[start : start + BATCH]
            vectors = _vectors(client, tokenizer, project_id, batch)
            with lease.transaction() as session:
                _keep(session, project_id, base, batch, vectors)
    log.info("worked examples embedded", project=str(project_id), made=len(waiting))


def _drop_stale(session: Session, project_id: UUID, base: str) -> None:
    """Vectors of another base, and those whose example a judgement no longer supports."""
    mine = ExampleEmbedding.project_id == project_id
    session.execute(delete(ExampleEmbedding).where(mine, ExampleEmbedding.base_digest != base))
    joined = select(Example).join(ExampleEmbedding, ExampleEmbedding.example_id == Example.id)
    resting = {example.id: _ids(example) for example in session.scalars(joined.where(mine))}
    standing = _standing(session, [one for annotations in resting.values() for one in annotations])
    stale = [example_id for example_id, annotations in resting.items() if not standing.issuperset(annotations)]
    session.execute(delete(ExampleEmbedding).where(ExampleEmbedding.example_id.in_(stale)))


def _ids(example: Example) -> tuple[UUID, ...]:
    return tuple(UUID(one) for one in example.annotation_ids)


def _standing(session: Session, annotation_ids: Sequence[UUID]) -> set[UUID]:
    return set(session.scalars(select(Annotation.id).where(Annotation.id.in_(annotation_ids), reviews.standing())))


def _draft(session: Session, project_id: UUID) -> list[Waiting]:
    """Corrections without a vector, as examples; their rows are made where no revision has been built from them."""
    # Whether a correction makes a pair does not matter here, so no weights are too old.
    drafted = judged.draft_all(session, project_id, _corrected(session, project_id), Retired())
    config = session.get_one(Project, project_id).config
    mode, finder = pii.mode_of(config), pii_presidio.finder_of(config)
    drafts = [examples.treated(one, mode, finder) for one in drafted.drafts if one.source == "corrected"]
    entries = examples.add_examples(session, project_id, drafts)
    found = session.scalars(select(Example).where(among(Example.id, [entry.example_id for entry in entries])))
    return [
        Waiting(example.id, shown, completion, _ids(example))
        for example in found
        if not is_erased(example.content_hash)
        if (shown := shown_of(example.messages)) and (completion := example.completion or "")
        if len(completion) <= LONGEST_TEXT
    ]


def _corrected(session: Session, project_id: UUID) -> list[Judged]:
    """The newest settled items of the train split that somebody corrected and that have no vector."""
    with_vector = select(Example.interaction_id).join(ExampleEmbedding, ExampleEmbedding.example_id == Example.id)
    corrected = (
        select(ReviewItem.id)
        .join(Annotation, Annotation.review_item_id == ReviewItem.id)
        .where(
            ReviewItem.project_id == project_id, ReviewItem.split == "train", ReviewItem.state == "done",
            Annotation.verdict == "correct", reviews.standing(),
            ~with_vector.where(Example.interaction_id == ReviewItem.interaction_id).exists(),
        )
        .order_by(ReviewItem.id.desc())
        .limit(MOST_EXAMPLES)
    )  # fmt: skip
    return judged.read(session, project_id, list(session.scalars(corrected)))


def _vectors(
    client: SyncEngineClient, tokenizer: Tokenizer, project_id: UUID, batch: Sequence[Waiting]
) -> list[list[float]]:
    """One mean-pooled vector each, as the gateway asks for a question's. Raises EngineGone, PoolFailed."""
    messages = [
        Pool(
            id=f"embed-{one.example_id.hex}", prompt=read_tokens(tokenizer, one.shown), how="mean",
            namespace=project_id.hex, cache_salt=project_id.hex, priority="batch",
        )
        for one in batch
    ]  # fmt: skip
    replies = client.pool_many(messages)
    return [np.frombuffer(reply.vector, dtype="<f4").astype(float).tolist() for reply in replies]


def _keep(
    session: Session, project_id: UUID, base: str, batch: Sequence[Waiting], vectors: Sequence[list[float]]
) -> None:
    """A judgement may have been taken back meanwhile, or the correction erased: what it taught is not kept."""
    here = select(Example.id).where(among(Example.id, [one.example_id for one in batch]))
    # Under a lock that an erasure waits for: it finds the vector, or there is none.
    kept = set(session.scalars(here.where(~Example.content_hash.startswith(ERASED)).with_for_update(read=True)))
    standing = _standing(session, [one for waiting in batch for one in waiting.annotation_ids])
    rows = [
        {
            "example_id": one.example_id, "project_id": project_id, "base_digest": base, "shown": one.shown,
            "completion": one.completion, "embedding": vector,
        }
        for one, vector in zip(batch, vectors, strict=True)
        if one.example_id in kept and standing.issuperset(one.annotation_ids)
    ]  # fmt: skip
    if rows:
        session.execute(insert(ExampleEmbedding).on_conflict_do_nothing(), rows)
