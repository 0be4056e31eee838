"""Search in the log: filters that live in the URL, words, meaning, or both.

Words are looked for in windows of time, newest first, each pruned to its partitions, until a page is full or the time
is spent; what was not searched is said. Meaning is an exact scan of the vectors that are kept, a project's newest.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from math import log
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Text, cast, func, or_, select, text
from sqlalchemy.dialects.postgresql import REGCONFIG, TSQUERY
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from services.store.base import uuid7_time
from services.store.models import (
    ORIGINS,
    VERDICTS,
    Annotation,
    Feedback,
    Interaction,
    InteractionBody,
    InteractionEmbedding,
    ReviewItem,
)
from services.store.pages import first_id
from services.store.reviews import standing

WINDOWS = {
    "hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(days=7), "month": timedelta(days=30),
    "all": None,
}  # fmt: skip
FINISHES = ("stop", "length", "cancelled", "error")
JUDGED = (*(verdict for verdict in VERDICTS if verdict != "undo"), "waiting", "none")
CHOICES: Mapping[str, Sequence[str]] = {
    "mode": ("both", "words", "meaning"), "window": tuple(WINDOWS), "finish": FINISHES, "origin": ORIGINS,
    "feedback": ("negative", "positive", "any", "none"), "verdict": JUDGED, "split": ("train", "held_out"),
    "confidence": ("low",), "drafted": ("yes", "no"),
}  # fmt: skip
DEFAULTS = {"mode": "both", "window": "all"}
# Shorter in an address, as people know it.
ADDRESSED = {"words": "q"}
LONGEST_WORDS = 2000
LONGEST_VALUE = 200
# Tokens that were on average less likely than not.
LOW_LOGPROB = log(0.5)
SECONDS = 1.5
# What a search may take by the plan that is best when its words are frequent.
GUESS_SECONDS = 0.1
FIRST_SPAN = timedelta(days=1)
# A typed beginning shorter than this begins too many words.
SHORTEST_PREFIX = 3
RANKED = 200
# Reciprocal rank fusion: Cormack, Clarke and Büttcher, SIGIR 2009.
FUSION = 60


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the list is narrowed to; empty strings leave a field alone. `digest` "base" is the base model; `tag` is
    a tag's name, or name=value."""

    words: str = ""
    mode: str = "both"
    window: str = "all"
    digest: str = ""
    finish: str = ""
    origin: str = ""
    feedback: str = ""
    tag: str = ""
    verdict: str = ""
    split: str = ""
    user: str = ""
    session: str = ""
    confidence: str = ""
    drafted: str = ""

    @property
    def query(self) -> str:
        """This search as the end of an address; searches that are the same have the same."""
        return urlencode(self.stored)

    @property
    def stored(self) -> list[tuple[str, str]]:
        """The fields of an address that somebody chose."""
        chosen = [(name, value) for name, value in vars(self).items() if value and value != DEFAULTS.get(name)]
        return [(ADDRESSED.get(name, name), value) for name, value in chosen]

    @property
    def start(self) -> UUID | None:
        """The smallest id of its window of time, as the clock stands."""
        since = _start(self)
        return first_id(since) if since else None

    @property
    def filtered(self) -> bool:
        """Whether anything but the words narrows it."""
        return any(
            value for name, value in vars(self).items() if name not in ("words", "mode") and value != DEFAULTS.get(name)
        )


def parsed(given: Mapping[str, str]) -> Search:
    """A search from an address or a stored one: what is no choice of a field is left out, NUL is no text."""
    known: dict[str, str] = {}
    for field in fields(Search):
        value = given.get(field.name) or given.get(ADDRESSED.get(field.name, ""), "")
        value = value.replace("\x00", "").strip()
        value = value[: LONGEST_WORDS if field.name == "words" else LONGEST_VALUE]
        if value and (field.name not in CHOICES or value in CHOICES[field.name]):
            known[field.name] = value
    return Search(**known)


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
    query = _matching(session, project_id, search)
    if query is None:
        return Found([], None)
    key = query.selected_columns[0]
    start = _start(search)
    if not (search.words or search.filtered or since):
        bounded = query if before is None else query.where(key < before)
        return Found(list(session.scalars(bounded.order_by(key.desc()).limit(limit))), None)
    oldest = session.scalar(
        select(Interaction.id).where(Interaction.project_id == project_id).order_by(Interaction.id).limit(1)
    )
    if oldest is None:
        return Found([], None)
    floor = max(oldest, first_id(start) if start else oldest, since or oldest)
    top = before or first_id(datetime.now(UTC) + timedelta(days=1))
    return _walk(session, query, floor, top, limit, seconds, indexed=bool(search.words))


def _walk(
    session: Session, query: Select[UUID], floor: UUID, top: UUID, limit: int, seconds: float, *, indexed: bool
) -> Found:
    """Windows of a day, then twice as long each: the newest partitions are often all it takes.

    Words that seem frequent each and are rare together mislead Postgres into reading the newest rows one by one. Where
    that takes long, `indexed` searches go on by the index alone, which costs as much as there are matches.
    """
    key = query.selected_columns[0]
    ids: list[UUID] = []
    span, deadline = FIRST_SPAN, time.monotonic() + seconds
    by_index = False
    while top > floor and len(ids) < limit:
        low = max(floor, first_id(_time(top) - span))
        window = query.where(key >= low, key < top)
        first = window.order_by(key.desc()).limit(limit - len(ids))
        left = deadline - time.monotonic()
        rows = None
        if not by_index and left > 0:
            rows = _timed(session, first, min(left, GUESS_SECONDS) if indexed else left)
            by_index = rows is None and indexed
        left = deadline - time.monotonic()
        if by_index and left > 0:
            rows = _timed(session, _by_index(window, limit - len(ids)), left)
        if rows is None:
            return Found(ids, _time(top))
        ids += rows
        top, span = low, span * 2
    return Found(ids, None)


def _by_index(window: Select[UUID], limit: int) -> Select[UUID]:
    """OFFSET 0 keeps the order and the limit out of the inner query, and with them the walk along the ids."""
    inner = window.offset(0).subquery()
    return select(inner.c[0]).order_by(inner.c[0].desc()).limit(limit)


def _time(identity: UUID) -> datetime:
    return datetime.fromtimestamp((identity.int >> 80) / 1000, UTC)


def _timed(session: Session, query: Select[UUID], seconds: float) -> list[UUID] | None:
    """The rows, or None when they take too long; the transaction goes on either way."""
    try:
        with session.begin_nested():
            session.execute(text(f"SET LOCAL statement_timeout = {max(1, int(seconds * 1000))}"))
            rows = list(session.scalars(query))
            session.execute(text("SET LOCAL statement_timeout = DEFAULT"))
            return rows
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", "") != "57014":
            raise
        return None


def _matching(session: Session, project_id: UUID, search: Search) -> Select[UUID] | None:
    """The ids that fit, unordered; None when the words hold nothing to look for. Words alone need no other table."""
    narrowed = conditions(project_id, search)
    if not search.words:
        return select(Interaction.id).where(Interaction.project_id == project_id, *narrowed)
    wanted = terms(session, search.words)
    if not wanted.text:
        return None
    query = select(InteractionBody.id).where(*_holding(project_id, wanted))
    if narrowed:
        query = query.join(Interaction, Interaction.id == InteractionBody.id).where(*narrowed)
    return query


def _holding(project_id: UUID, wanted: Terms) -> tuple[ColumnElement[bool], ...]:
    own = cast(f"'project{project_id.hex}'", TSQUERY)
    return InteractionBody.project_id == project_id, InteractionBody.document.op("@@")(wanted.query.op("&&")(own))


def _start(search: Search) -> datetime | None:
    """When the search's window of time begins."""
    span = WINDOWS[search.window]
    return datetime.now(UTC) - span if span else None


# --- filters ----------------------------------------------------------------------------------------------


def conditions(project_id: UUID, search: Search) -> list[ColumnElement[bool]]:
    """Everything but the words, on `Interaction`."""
    found: list[ColumnElement[bool]] = []
    since = _start(search)
    if since is not None:
        found.append(Interaction.id >= first_id(since))
    if search.digest:
        served = Interaction.adapter_digest
        found.append(served.is_(None) if search.digest == "base" else served.startswith(search.digest, autoescape=True))
    for value, column in (
        (search.finish, Interaction.finish_reason), (search.origin, Interaction.origin),
        (search.user, Interaction.end_user), (search.session, Interaction.session_key),
    ):  # fmt: skip
        if value:
            found.append(column == value)
    if search.tag:
        name, equals, value = search.tag.partition("=")
        tagged = Interaction.tags
        found.append(tagged[name.strip()].astext == value.strip() if equals else tagged.has_key(name))
    if search.confidence:
        found.append(Interaction.mean_logprob < LOW_LOGPROB)
    if search.drafted:
        found.append(Interaction.drafted_tokens > 0 if search.drafted == "yes" else Interaction.drafted_tokens == 0)
    if search.feedback:
        found.append(_opinion(search.feedback, project_id))
    if search.verdict:
        found.append(_verdict(search.verdict))
    if search.split:
        found.append(_item().where(ReviewItem.split == search.split).exists())
    return found


def _opinion(kind: str, project_id: UUID) -> ColumnElement[bool]:
    said = select(Feedback.id).where(Feedback.interaction_id == Interaction.id, Feedback.project_id == project_id)
    if kind == "negative":
        said = said.where(or_(Feedback.rating < 0, Feedback.correction.is_not(None)))
    elif kind == "positive":
        said = said.where(Feedback.rating > 0)
    present = said.correlate(Interaction).exists()
    return ~present if kind == "none" else present


def _item() -> Select[UUID]:
    return select(ReviewItem.id).where(ReviewItem.interaction_id == Interaction.id).correlate(Interaction)


def _verdict(verdict: str) -> ColumnElement[bool]:
    """A judgement that stands; "waiting" is in the queue, "none" was never chosen for it."""
    if verdict == "none":
        return ~_item().exists()
    if verdict == "waiting":
        return _item().where(ReviewItem.state.in_(("open", "escalated", "disputed"))).exists()
    judged = _item().join(Annotation, Annotation.review_item_id == ReviewItem.id)
    return judged.where(Annotation.verdict == verdict, standing()).exists()


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
    narrowed = conditions(project_id, search)
    if narrowed:
        query = query.join(Interaction, Interaction.id == InteractionEmbedding.id).where(*narrowed)
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


def embedded_since(session: Session, project_id: UUID, model: str) -> datetime | None:
    """When the oldest answer whose vector is kept was given; None when there are none."""
    oldest = (
        select(InteractionEmbedding.id)
        .where(InteractionEmbedding.project_id == project_id, InteractionEmbedding.model == model)
        .order_by(InteractionEmbedding.id)
        .limit(1)
    )
    found = session.scalar(oldest)
    return uuid7_time(found) if found else None
