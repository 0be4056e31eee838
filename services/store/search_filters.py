"""What the interactions list is narrowed to: fields that live in the URL, and the conditions they stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from math import log
from typing import NamedTuple
from urllib.parse import urlencode
from uuid import UUID

from sqlalchemy import ColumnElement, Select, or_, select

from services.store.models import ORIGINS, VERDICTS, Annotation, Feedback, Interaction, ReviewItem
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
        since = start_of(self)
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


def conditions(project_id: UUID, search: Search) -> list[ColumnElement[bool]]:
    """Everything but the words, on `Interaction`, each answered row by row.

    OFFSET 0 keeps Postgres from joining instead. It knows next to nothing of how many ids lie between two of them
    (of types it cannot subtract it only knows which hundredth of the table they are in), takes thousands to be one, and
    then compares each with each.
    """
    found: list[ColumnElement[bool]] = []
    since = start_of(search)
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
    here = Interaction.id
    for wanted, ids in (
        (search.feedback != "none", _opinions(project_id, search.feedback)),
        (search.verdict != "none", _judged(project_id, search.verdict)),
        (True, _chosen(project_id, search.split)),
    ):
        if ids is not None:
            known = ids.where(ids.selected_columns[0] == here).correlate(Interaction).offset(0).exists()
            found.append(known if wanted else ~known)
    return found


class Said(NamedTuple):
    """Ids that people said something of, as one filter asks, and what the other filters ask."""

    ids: Select[UUID]
    rest: Search


def said_of(project_id: UUID, search: Search, low: UUID, top: UUID) -> Said | None:
    """Those of [low, top), where a filter asks for any: far fewer than there are. Some may be of no answer."""
    for name, ids in (
        ("verdict", _judged(project_id, search.verdict) if search.verdict != "none" else None),
        ("feedback", _opinions(project_id, search.feedback) if search.feedback != "none" else None),
        ("split", _chosen(project_id, search.split)),
    ):
        if ids is not None:
            key = ids.selected_columns[0]
            return Said(ids.where(key >= low, key < top).distinct(), replace(search, **{name: ""}))
    return None


def _opinions(project_id: UUID, kind: str) -> Select[UUID] | None:
    said = select(Feedback.interaction_id).where(Feedback.project_id == project_id)
    if kind == "negative":
        return said.where(or_(Feedback.rating < 0, Feedback.correction.is_not(None)))
    if kind == "positive":
        return said.where(Feedback.rating > 0)
    return said if kind else None


def _chosen(project_id: UUID, split: str) -> Select[UUID] | None:
    items = select(ReviewItem.interaction_id).where(ReviewItem.project_id == project_id)
    return items.where(ReviewItem.split == split) if split else None


def _judged(project_id: UUID, verdict: str) -> Select[UUID] | None:
    """A judgement that stands; "waiting" is in the queue, "none" was never chosen for it."""
    items = select(ReviewItem.interaction_id).where(ReviewItem.project_id == project_id)
    if verdict == "waiting":
        return items.where(ReviewItem.state.in_(("open", "escalated", "disputed")))
    if verdict not in ("", "none"):
        judged = items.join(Annotation, Annotation.review_item_id == ReviewItem.id)
        return judged.where(Annotation.verdict == verdict, standing())
    return items if verdict else None


def start_of(search: Search) -> datetime | None:
    """When the search's window of time begins."""
    span = WINDOWS[search.window]
    return datetime.now(UTC) - span if span else None
