"""What the platform answers, as frozen dataclasses. Unknown fields of newer platforms are passed over."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

Verdict = Literal["accept", "correct", "reject", "prefer", "skip", "escalate"]
Side = Literal["left", "right", "tie"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Feedback:
    """Stored feedback. `landed` is False while the interaction itself is still on its way to the database."""

    id: str
    interaction_id: str
    landed: bool


@dataclass(frozen=True)
class Said:
    """Feedback as an interaction's page lists it."""

    id: str
    rating: int | None
    score: float | None
    comment: str | None
    correction: str | None
    user: str | None
    created_at: str


@dataclass(frozen=True)
class Line:
    """An interaction in the list; `prompt` and `output` are excerpts, None when the text is past retention."""

    id: str
    started_at: str
    origin: str
    adapter_digest: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float | None
    prompt: str | None
    output: str | None


@dataclass(frozen=True)
class Interaction:
    """One interaction in full. `messages` and `output` are None when the text is past retention."""

    id: str
    started_at: str
    adapter_digest: str | None
    finish_reason: str
    messages: list[dict[str, Any]] | None
    output: str | None
    feedback: list[Said]


@dataclass(frozen=True)
class Item:
    """A review item held under a lease of three minutes; `lease_token` proves it.

    `pair` holds the left and the right answer of an item to compare, whose `output` is empty; it is None for others.
    """

    id: str
    lease_token: str
    lease_expires_at: str
    messages: list[dict[str, Any]]
    output: str
    pair: list[str] | None = None


@dataclass(frozen=True)
class Annotation:
    """A stored judgement. `replayed` when the same call had stored it before."""

    id: str
    item_id: str
    interaction_id: str
    verdict: str
    replayed: bool


@dataclass(frozen=True)
class Undone:
    """The item whose judgement was taken back, and its state now."""

    item_id: str
    state: str


def read(kind: type[Made], document: Mapping[str, Any]) -> Made:
    """A document as one of the classes above. Raises KeyError for a field that is missing and has no default."""
    wanted = [field for field in fields(kind) if field.name in document or field.default is MISSING]  # type: ignore[arg-type]
    return kind(**{field.name: document[field.name] for field in wanted})
