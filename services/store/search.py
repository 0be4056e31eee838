"""Search in the log: words, meaning, or both, narrowed by the filters of `search_filters`.

Words are looked for newest first until a page is full or the time is spent; what was not searched is said. Meaning is
an exact scan of the vectors that are kept, a project's newest.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Executable, Select, Subquery, Text, and_, cast, func, select, text, true
from sqlalchemy.dialects.postgresql import REGCONFIG, TSQUERY
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import InstrumentedAttribute, Session

from services.store.base import uuid7_time
from services.store.models import Interaction, InteractionBody, InteractionEmbedding
from services.store.pages import first_id
from services.store.search_filters import CHOICES, WINDOWS, Search, between, conditions, parsed, start_of

__all__ = [
    "CHOICES", "RANKED", "WINDOWS", "Found", "Meaning", "Search", "best_words", "conditions", "embedded_since", "fused",
    "nearest", "newest", "parsed", "terms",
]  # fmt: skip

SECONDS = 1.5
FIRST_SPAN = timedelta(days=1)
# The newest answers that tell how frequent the words are.
SAMPLED = 400
# Answers that are read one by one at most. What takes more is looked up: words that are rarer by their index.
WALKED = 4000
# Words in fewer answers than this are looked up before the filters are.
FREQUENT = 0.05
# A typed beginning shorter than this begins too many words.
SHORTEST_PREFIX = 3
RANKED = 200
# Reciprocal rank fusion: Cormack, Clarke and Büttcher, SIGIR 2009.
FUSION = 60


class Found(NamedTuple):
    """Ids in order. `back_to` is how far the search came when its time was spent before all was searched."""

    ids: list[UUID]
    back_to: datetime | None


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
    start = start_of(search)
    floor = max(oldest, first_id(start) if start else oldest, since or oldest)
    top = before or first_id(datetime.now(UTC) + timedelta(days=1))
    return _Walk(session, project_id, search, wanted, floor, top, limit, time.monotonic() + seconds).found()


class _Shares(NamedTuple):
    """Of the answers, those that held the words; of these, those that the filters let through."""

    held: float
    fit: float


class _Walk:
    """From `top` down to `floor`, until `limit` ids are found or the time is spent.

    Answer by answer while the newest ones show that this is soon done; else by what narrows most, in windows of a day
    and then twice as long each. Postgres cannot be left to choose: words that are frequent each are frequent together
    to it, and a page of the newest costs it the same wherever the matches lie.
    """

    def __init__(
        self,
        session: Session,
        project_id: UUID,
        search: Search,
        words: Terms | None,
        floor: UUID,
        top: UUID,
        limit: int,
        deadline: float,
    ) -> None:
        self._session, self._project_id, self._search, self._words = session, project_id, search, words
        self._floor, self._top, self._limit, self._deadline = floor, top, limit, deadline
        self._ids: list[UUID] = []

    def found(self) -> Found:
        """The whole way."""
        seen = self._one_by_one()
        if self._words is None:
            return self._windows(self._fitting)
        narrower = seen.held >= FREQUENT and seen.fit < seen.held
        return self._windows(self._filters_first if narrower and self._search.filtered else self._words_first)

    def _wants_more(self) -> bool:
        return self._top > self._floor and len(self._ids) < self._limit

    def _one_by_one(self) -> _Shares:
        """Reads the newest answers, more while that fills the page; the shares are of the last ones it read."""
        rows, walked, shares = SAMPLED, 0, _Shares(0.0, 0.0)
        while self._wants_more() and walked + rows <= WALKED:
            low = self._below(rows)
            got = self._timed(self._reading(low, rows))
            if got is None:
                return shares
            fit = [one for one, fits in got if fits]
            self._ids += fit[: self._limit - len(self._ids)]
            shares = _Shares(len(got) / rows, len(fit) / max(1, len(got)))
            self._top, walked = low, walked + rows
            rows = max(SAMPLED, round(1.2 * (self._limit - len(self._ids)) * rows / max(len(fit), 0.5)))
        return shares

    def _below(self, rows: int) -> UUID:
        """The id that has `rows` of the project's answers from it up to the top."""
        newest_ones = self._own(self._floor).order_by(Interaction.id.desc()).offset(rows - 1).limit(1)
        return self._session.scalar(newest_ones) or self._floor

    def _reading(self, low: UUID, rows: int) -> Select[UUID, bool]:
        """Newest first what holds the words, and whether the filters let it through. LIMIT keeps it one by one."""
        chunk = self._own(low).order_by(Interaction.id.desc()).limit(rows).subquery()
        fits = and_(true(), *conditions(self._project_id, self._search, low, self._top))
        query = select(chunk.c.id, fits)
        if self._search.filtered:
            query = query.join(Interaction, Interaction.id == chunk.c.id).where(*self._between(Interaction.id, low))
        if self._words is not None:
            query = query.join(InteractionBody, InteractionBody.id == chunk.c.id).where(*self._holding(low))
        return query.order_by(chunk.c.id.desc())

    def _windows(self, query: Callable[[UUID], Select[UUID]]) -> Found:
        """`query` gives what fits from an id up to the top, unordered. OFFSET 0 keeps the order and the limit out."""
        span = FIRST_SPAN
        while self._wants_more():
            low = max(self._floor, first_id(_time(self._top) - span))
            fitting = query(low).offset(0).subquery()
            key = fitting.c[0]
            got = self._timed(select(key).select_from(fitting).order_by(key.desc()).limit(self._limit - len(self._ids)))
            if got is None:
                return Found(self._ids, _time(self._top))
            self._ids += [row[0] for row in got]
            self._top, span = low, span * 2
        return Found(self._ids, None)

    def _fitting(self, low: UUID) -> Select[UUID]:
        return self._own(low).where(*conditions(self._project_id, self._search, low, self._top))

    def _words_first(self, low: UUID) -> Select[UUID]:
        holding = select(InteractionBody.id).where(*self._holding(low))
        return _each(holding, self._fitting(low), Interaction.id) if self._search.filtered else holding

    def _filters_first(self, low: UUID) -> Select[UUID]:
        holding = select(InteractionBody.id).where(*self._holding(low))
        return _each(self._fitting(low), holding, InteractionBody.id)

    def _own(self, low: UUID) -> Select[UUID]:
        own = Interaction.project_id == self._project_id
        return select(Interaction.id).where(own, *self._between(Interaction.id, low))

    def _holding(self, low: UUID) -> list[ColumnElement[bool]]:
        """The words, and one that only answers of the project have."""
        assert self._words is not None
        marked = cast(f"'project{self._project_id.hex}'", TSQUERY)
        held = InteractionBody.document.op("@@")(self._words.query.op("&&")(marked))
        return [InteractionBody.project_id == self._project_id, held, *self._between(InteractionBody.id, low)]

    def _between(self, key: InstrumentedAttribute[UUID], low: UUID) -> list[ColumnElement[bool]]:
        return between(key, low, self._top)

    def _timed(self, query: Executable) -> Sequence[Any] | None:
        left = self._deadline - time.monotonic()
        return _timed(self._session, query, left) if left > 0 else None


def _each(some: Select[UUID], others: Select[UUID], key: InstrumentedAttribute[UUID]) -> Select[UUID]:
    """Ids of both, looked up one by one among the others: where Postgres takes many to be few and may choose, it
    compares each with each."""
    first = some.offset(0).subquery()
    also = others.where(key == first.c.id).offset(0).lateral()
    return select(first.c.id).join(also, true())


def _time(identity: UUID) -> datetime:
    return datetime.fromtimestamp((identity.int >> 80) / 1000, UTC)


def _timed(session: Session, query: Executable, seconds: float) -> Sequence[Any] | None:
    """The rows, or None when they take too long; the transaction goes on either way."""
    try:
        with session.begin_nested():
            session.execute(text(f"SET LOCAL statement_timeout = {max(1, int(seconds * 1000))}"))
            rows = session.execute(query).all()
            session.execute(text("SET LOCAL statement_timeout = DEFAULT"))
            return rows
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", "") != "57014":
            raise
        return None


# --- by meaning, and both ---------------------------------------------------------------------------------


class Meaning(NamedTuple):
    """What was typed as a vector of length 1, and the model it comes from."""

    vector: Sequence[float]
    model: str


def nearest(session: Session, project_id: UUID, search: Search, meaning: Meaning, *, limit: int = RANKED) -> list[UUID]:
    """The nearest first, of all vectors the project keeps of this model that fit the filters."""
    # Of unit vectors the inner product is the cosine, and cheaper.
    near = InteractionEmbedding.vector.max_inner_product(list(meaning.vector))
    query = select(InteractionEmbedding.id).where(
        InteractionEmbedding.project_id == project_id, InteractionEmbedding.model == meaning.model
    )
    if search.filtered:
        fitting = _of_the_embedded(project_id, search, _oldest_embedded(session, project_id, meaning.model))
        query = query.join(fitting, fitting.c.id == InteractionEmbedding.id)
    return list(session.scalars(query.order_by(near, InteractionEmbedding.id.desc()).limit(limit)))


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


def _of_the_embedded(project_id: UUID, search: Search, oldest: UUID | None) -> Subquery:
    """What fits the filters as far back as there are vectors: mostly few, whose vectors alone are then compared."""
    narrowed = conditions(project_id, search, low=oldest)
    own = select(Interaction.id).where(Interaction.project_id == project_id, *between(Interaction.id, oldest, None))
    return own.where(*narrowed).offset(0).subquery()


def embedded_since(session: Session, project_id: UUID, model: str) -> datetime | None:
    """When the oldest answer whose vector is kept was given; None when there are none."""
    found = _oldest_embedded(session, project_id, model)
    return uuid7_time(found) if found else None


def _oldest_embedded(session: Session, project_id: UUID, model: str) -> UUID | None:
    own = InteractionEmbedding.project_id == project_id, InteractionEmbedding.model == model
    return session.scalar(select(InteractionEmbedding.id).where(*own).order_by(InteractionEmbedding.id).limit(1))
