"""The way down a project's log: what fits, newest first, whatever share of it that is and however it is asked.

Postgres knows next to nothing of how many ids lie between two of them and takes words that are frequent each for
frequent together. So nothing here leaves it a join to choose: what may be many is looked up one by one.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Executable, Select, and_, cast, select, text, true
from sqlalchemy.dialects.postgresql import TSQUERY
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import InstrumentedAttribute, Session

from services.store.models import Interaction, InteractionBody
from services.store.pages import first_id
from services.store.search_filters import Search, conditions, said_of

FIRST_SPAN = timedelta(days=1)
# The newest answers that tell how frequent the words are.
SAMPLED = 400
# Answers that are read one by one at most. What takes more is looked up: words that are rarer by their index.
WALKED = 4000
# Words in fewer answers than this are looked up before the filters are.
FREQUENT = 0.05


class Found(NamedTuple):
    """Ids in order. `back_to` is how far the search came when its time was spent before all was searched."""

    ids: list[UUID]
    back_to: datetime | None


class _Shares(NamedTuple):
    """Of the answers, those that held the words; of these, those that the filters let through."""

    held: float
    fit: float


class Walk:
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
        words: ColumnElement[Any] | None,
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
        """Newest first what holds the words, and whether the filters let it through."""
        chunk = self._own(low).order_by(Interaction.id.desc()).limit(rows).subquery()
        query = select(chunk.c.id, true())
        if self._search.filtered:
            fits = and_(true(), *conditions(self._project_id, self._search)).label("fits")
            one = select(fits).where(Interaction.id == chunk.c.id, *self._between(Interaction.id, low))
            row = one.offset(0).lateral()
            query = select(chunk.c.id, row.c.fits).join(row, true())
        if self._words is not None:
            body = select(InteractionBody.id).where(InteractionBody.id == chunk.c.id, *self._holding(low))
            query = query.join(body.offset(0).lateral(), true())
        return query.order_by(chunk.c.id.desc())

    def _windows(self, query: Callable[[UUID], Select[UUID]]) -> Found:
        """`query` gives what fits from an id up to the top, unordered. OFFSET 0 keeps the order and the limit out."""
        # Of one person or session there is little, and an index knows where.
        named = self._words is None and (self._search.user or self._search.session)
        span = FIRST_SPAN if not named else _time(self._top) - _time(self._floor) + FIRST_SPAN
        while self._wants_more():
            low = max(self._floor, first_id(_time(self._top) - span))
            inner = query(low).offset(0).subquery()
            key = inner.c[0]
            got = self._timed(select(key).select_from(inner).order_by(key.desc()).limit(self._limit - len(self._ids)))
            if got is None:
                return Found(self._ids, _time(self._top))
            self._ids += [row[0] for row in got]
            self._top, span = low, span * 2
        return Found(self._ids, None)

    def _fitting(self, low: UUID) -> Select[UUID]:
        return fitting(self._project_id, self._search, low, self._top)

    def _words_first(self, low: UUID) -> Select[UUID]:
        holding = select(InteractionBody.id).where(*self._holding(low))
        if not self._search.filtered:
            return holding
        return _each(holding, self._own(low).where(*conditions(self._project_id, self._search)), Interaction.id)

    def _filters_first(self, low: UUID) -> Select[UUID]:
        holding = select(InteractionBody.id).where(*self._holding(low))
        fits = fitting(self._project_id, self._search, low, self._top, looked_up=True)
        return _each(fits, holding, InteractionBody.id)

    def _own(self, low: UUID) -> Select[UUID]:
        own = Interaction.project_id == self._project_id
        return select(Interaction.id).where(own, *self._between(Interaction.id, low))

    def _holding(self, low: UUID) -> list[ColumnElement[bool]]:
        """The words, and one that only answers of the project have."""
        assert self._words is not None
        marked = cast(f"'project{self._project_id.hex}'", TSQUERY)
        held = InteractionBody.document.op("@@")(self._words.op("&&")(marked))
        return [InteractionBody.project_id == self._project_id, held, *self._between(InteractionBody.id, low)]

    def _between(self, key: InstrumentedAttribute[UUID], low: UUID) -> list[ColumnElement[bool]]:
        """Bounds of each table's own ids: Postgres carries them to no other one's partitions."""
        return [key >= low, key < self._top]

    def _timed(self, query: Executable) -> Sequence[Any] | None:
        left = self._deadline - time.monotonic()
        return _timed(self._session, query, left) if left > 0 else None


def fitting(project_id: UUID, search: Search, low: UUID, top: UUID, *, looked_up: bool = False) -> Select[UUID]:
    """What the filters let through in [low, top), found by what people said where a filter asks for that.

    `looked_up` leaves it to the caller to find out whether such an answer of the project is there.
    """
    key = Interaction.id
    own = select(key).where(Interaction.project_id == project_id, key >= low, key < top)
    said = said_of(project_id, search, low, top)
    if said is None:
        return own.where(*conditions(project_id, search))
    if looked_up and not said.rest.filtered:
        return said.ids
    return _each(said.ids, own.where(*conditions(project_id, said.rest)), key)


def _each(some: Select[UUID], others: Select[UUID], key: InstrumentedAttribute[UUID]) -> Select[UUID]:
    """Ids of both, looked up one by one among the others: where Postgres takes many to be few and may choose, it
    compares each with each."""
    first = some.offset(0).subquery().c[0]
    also = others.where(key == first).offset(0).lateral()
    return select(first).join(also, true())


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
