"""Search in the log: words, meaning, or both, narrowed by the filters of `search_filters`.

Words are looked for newest first until a page is full or the time is spent; what was not searched is said. Meaning is
an exact scan of the vectors that are kept, a project's newest.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast, func, select, true
from sqlalchemy.dialects.postgresql import REGCONFIG, TSQUERY
from sqlalchemy.orm import Session

from services.store.base import uuid7_time
from services.store.models import Interaction, InteractionBody, InteractionEmbedding
from services.store.pages import first_id
from services.store.search_filters import CHOICES, WINDOWS, Search, conditions, parsed, said_of, start_of
from services.store.search_walk import Found, Walk, fitting

__all__ = [
    "CHOICES", "RANKED", "WINDOWS", "Found", "Meaning", "Search", "best_words", "conditions", "embedded_since", "fused",
    "nearest", "newest", "parsed", "terms",
]  # fmt: skip

# A typed beginning shorter than this begins too many words.
SHORTEST_PREFIX = 3
SECONDS = 1.5
RANKED = 200
# Reciprocal rank fusion: Cormack, Clarke and Büttcher, SIGIR 2009.
FUSION = 60


class Terms(NamedTuple):
    """Words as Postgres will look for them; `text` is empty when nothing of what was typed can be looked for."""

    text: str

    @property
    def query(self) -> ColumnElement[Any]:
        return cast(self.text, TSQUERY)


def terms(session: Session, words: str) -> Terms:
    """Like a web search: "a phrase", or, -without; the last word also finds longer ones. No text is a syntax error."""
    made = session.scalar(select(cast(func.websearch_to_tsquery(cast("simple", REGCONFIG), words), Text))) or ""
    last = made.rpartition(" ")[2]
    if made.endswith("'") and not words.endswith(('"', "'")) and len(last.strip("'!")) >= SHORTEST_PREFIX:
        made += ":*"
    return Terms(made)


# --- newest first -----------------------------------------------------------------------------------------


def newest(
    session: Session,
    project_id: UUID,
    search: Search,
    *,
    before: UUID | None = None,
    since: UUID | None = None,
    limit: int = 50,
    seconds: float = SECONDS,
) -> Found:
    """What fits, newest first, older than `before` and no older than `since`, within about `seconds`."""
    key = Interaction.id
    own = Interaction.project_id == project_id
    if not (search.words or search.filtered or since):
        bounded = select(key).where(own) if before is None else select(key).where(own, key < before)
        return Found(list(session.scalars(bounded.order_by(key.desc()).limit(limit))), None)
    wanted = terms(session, search.words) if search.words else None
    oldest = session.scalar(select(key).where(own).order_by(key).limit(1))
    if oldest is None or (wanted is not None and not wanted.text):
        return Found([], None)
    query = wanted.query if wanted else None
    start = start_of(search)
    floor = max(oldest, first_id(start) if start else oldest, since or oldest)
    top = before or first_id(datetime.now(UTC) + timedelta(days=1))
    return Walk(session, project_id, search, query, floor, top, limit, time.monotonic() + seconds).found()


# --- by meaning, and both ---------------------------------------------------------------------------------


class Meaning(NamedTuple):
    """What was typed as a vector of length 1, and the model it comes from."""

    vector: Sequence[float]
    model: str


def nearest(session: Session, project_id: UUID, search: Search, meaning: Meaning, *, limit: int = RANKED) -> list[UUID]:
    """The nearest first, of all vectors the project keeps of this model that fit the filters."""
    # Of unit vectors the inner product is the cosine, and cheaper.
    near = InteractionEmbedding.vector.max_inner_product(list(meaning.vector)).label("near")
    kept = select(InteractionEmbedding.id, near).where(
        InteractionEmbedding.project_id == project_id, InteractionEmbedding.model == meaning.model
    )
    if search.filtered:
        oldest = _oldest_embedded(session, project_id, meaning.model)
        if oldest is None:
            return []
        top = first_id(datetime.now(UTC) + timedelta(days=1))
        fits = fitting(project_id, search, oldest, top, looked_up=True).offset(0).subquery().c[0]
        if said_of(project_id, search, oldest, top) is not None:  # few of them: each vector is looked up
            one = kept.where(InteractionEmbedding.id == fits).offset(0).lateral()
            kept = select(one.c.id, one.c.near).select_from(fits.table).join(one, true())
        else:
            kept = kept.join(fits.table, fits == InteractionEmbedding.id)
    found = kept.subquery()
    return list(session.scalars(select(found.c.id).order_by(found.c.near, found.c.id.desc()).limit(limit)))


def best_words(session: Session, project_id: UUID, search: Search, *, limit: int = RANKED) -> Found:
    """The newest that hold the words, the closest together and most often first."""
    found = newest(session, project_id, search, limit=limit)
    if not found.ids:
        return found
    rank = func.ts_rank_cd(InteractionBody.document, terms(session, search.words).query)
    ranked = select(InteractionBody.id).where(InteractionBody.id.in_(found.ids))
    return Found(list(session.scalars(ranked.order_by(rank.desc(), InteractionBody.id.desc()))), found.back_to)


def fused(*lists: Sequence[UUID]) -> list[UUID]:
    """Reciprocal rank fusion: near the top of either list is good, of both is best."""
    scores: dict[UUID, float] = {}
    for ids in lists:
        for place, one in enumerate(ids, 1):
            scores[one] = scores.get(one, 0.0) + 1 / (FUSION + place)
    return sorted(scores, key=lambda one: (-scores[one], -one.int))


def embedded_since(session: Session, project_id: UUID, model: str) -> datetime | None:
    """When the oldest answer whose vector is kept was given; None when there are none."""
    found = _oldest_embedded(session, project_id, model)
    return uuid7_time(found) if found else None


def _oldest_embedded(session: Session, project_id: UUID, model: str) -> UUID | None:
    own = InteractionEmbedding.project_id == project_id, InteractionEmbedding.model == model
    return session.scalar(select(InteractionEmbedding.id).where(*own).order_by(InteractionEmbedding.id).limit(1))
