"""What the interactions list is narrowed to: fields that live in the URL, and the conditions they stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from math import log
from urllib.parse import urlencode
from uuid import UUID

from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import InstrumentedAttribute

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


def conditions(
    project_id: UUID, search: Search, low: UUID | None = None, top: UUID | None = None
) -> list[ColumnElement[bool]]:
    """Everything but the words, on `Interaction`.

    Whoever looks at ids in [low, top) only says so: what was said of others is then not read. The bounds themselves
    are the caller's to add.
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
    if search.feedback:
        found.append(_opinion(search.feedback, project_id, low, top))
    if search.verdict:
        found.append(_verdict(search.verdict, low, top))
    if search.split:
        found.append(_item(low, top).where(ReviewItem.split == search.split).exists())
    return found


def between(key: InstrumentedAttribute[UUID], low: UUID | None, top: UUID | None) -> list[ColumnElement[bool]]:
    """Bounds of a table's own ids: Postgres does not carry them from one table of a join to another."""
    return [*([] if low is None else [key >= low]), *([] if top is None else [key < top])]


def _opinion(kind: str, project_id: UUID, low: UUID | None, top: UUID | None) -> ColumnElement[bool]:
    said = select(Feedback.id).where(
        Feedback.interaction_id == Interaction.id, Feedback.project_id == project_id,
        *between(Feedback.interaction_id, low, top),
    )  # fmt: skip
    if kind == "negative":
        said = said.where(or_(Feedback.rating < 0, Feedback.correction.is_not(None)))
    elif kind == "positive":
        said = said.where(Feedback.rating > 0)
    present = said.correlate(Interaction).exists()
    return ~present if kind == "none" else present


def _item(low: UUID | None, top: UUID | None) -> Select[UUID]:
    chosen = select(ReviewItem.id).where(ReviewItem.interaction_id == Interaction.id)
    return chosen.where(*between(ReviewItem.interaction_id, low, top)).correlate(Interaction)


def _verdict(verdict: str, low: UUID | None, top: UUID | None) -> ColumnElement[bool]:
    """A judgement that stands; "waiting" is in the queue, "none" was never chosen for it."""
    if verdict == "none":
        return ~_item(low, top).exists()
    if verdict == "waiting":
        return _item(low, top).where(ReviewItem.state.in_(("open", "escalated", "disputed"))).exists()
    judged = _item(low, top).join(Annotation, Annotation.review_item_id == ReviewItem.id)
    return judged.where(Annotation.verdict == verdict, standing()).exists()


def start_of(search: Search) -> datetime | None:
    """When the search's window of time begins."""
    span = WINDOWS[search.window]
    return datetime.now(UTC) - span if span else None
