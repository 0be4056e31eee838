"""POST /v1/feedback: what an app or its user says of an answer, stored at most once."""

import hashlib
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy.exc import InterfaceError, OperationalError

from services.errors import Unavailable, Unprocessable
from services.gateway import access
from services.gateway.bodies import LONGEST_LABEL, Label, decode
from services.gateway.snapshot import KnownKey, Snapshot
from services.gateway.spool_format import without_nul
from services.store import feedback as store_feedback
from services.store import keys
from services.store.base import Sessions
from services.store.models import ApiKey, Interaction

LONGEST_TEXT = 100_000
Text = Annotated[str, msgspec.Meta(max_length=LONGEST_TEXT)]


class FeedbackBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`interaction_id` is an answer's id or its `x-whet-interaction-id`; keys of no project may need `model`."""

    interaction_id: str
    model: str | None = None
    rating: int | None = None
    score: float | None = None
    comment: Text | None = None
    correction: Text | None = None
    user: Label | None = None
    idempotency_key: Label | None = None


class Told(NamedTuple):
    """Checked feedback."""

    interaction_id: UUID
    model: str | None
    idempotency_key: str
    opinion: store_feedback.Opinion


class Answered(NamedTuple):
    """What the caller hears."""

    created: bool
    described: dict[str, Any]


_decoder: msgspec.json.Decoder[FeedbackBody] = msgspec.json.Decoder(FeedbackBody)


def parse(raw: bytes, header_key: str | None) -> Told:
    """Raises InvalidRequest for a malformed body, Unprocessable for one that says nothing sensible."""
    body = decode(_decoder, raw)
    if len(header_key or "") > LONGEST_LABEL:
        raise Unprocessable(f"Idempotency-Key is longer than {LONGEST_LABEL} characters", param="idempotency_key")
    interaction_id = _interaction_id(body.interaction_id)
    store_feedback.check_id(interaction_id)
    if all(value is None for value in (body.rating, body.score, body.comment, body.correction)):
        raise Unprocessable("feedback needs a rating, a score, a comment or a correction")
    if body.rating not in (None, -1, 0, 1):
        raise Unprocessable(f"rating is -1, 0 or 1, not {body.rating}; use score for other scales", param="rating")
    opinion = store_feedback.Opinion(
        rating=body.rating,
        score=body.score,
        comment=_clean(body.comment),
        correction=_clean(body.correction),
        author=_clean(body.user),
    )
    key = _clean(body.idempotency_key or header_key) or _content_key(interaction_id, opinion)
    return Told(interaction_id, body.model, key, opinion)


def _interaction_id(text: str) -> UUID:
    bare = text.removeprefix("chatcmpl-").removeprefix("cmpl-")
    try:
        return UUID(bare)
    except ValueError as error:
        raise Unprocessable(f"{text[:80]!r} is not the id of an interaction", param="interaction_id") from error


def _clean(text: str | None) -> str | None:
    return None if text is None else str(without_nul(text))


def _content_key(interaction_id: UUID, opinion: store_feedback.Opinion) -> str:
    """Without a key of the caller's own, saying the same twice counts once."""
    content = msgspec.json.encode([str(interaction_id), vars(opinion)])
    return f"content:{hashlib.sha256(content).hexdigest()}"


def project_of(snapshot: Snapshot, key: KnownKey, told: Told) -> UUID | None:
    """The project the feedback belongs to; None for `store` to find out from the interaction itself."""
    if told.model is not None:
        return access.find_project(snapshot, key, told.model.partition("@")[0]).id
    return key.project_id


def store(sessions: Sessions, project_id: UUID | None, told: Told, key_id: UUID) -> Answered:
    """Write it down, and that the key was used.

    Raises Unavailable while the database is away: only what is stored is acknowledged.
    """
    try:
        with sessions.begin() as session:
            landed = session.get(Interaction, told.interaction_id)
            project_id = project_id or (landed.project_id if landed else None)
            if project_id is None:
                raise Unprocessable("this key belongs to no project: say which with `model`", param="model")
            row, created = store_feedback.add(
                session, project_id, told.interaction_id, told.idempotency_key, told.opinion
            )
            keys.seen(session, session.get_one(ApiKey, key_id))
            described = {
                "id": str(row.id),
                "object": "feedback",
                "interaction_id": str(row.interaction_id),
                "landed": landed is not None,
            }
    except (OperationalError, InterfaceError) as error:
        raise Unavailable("the database is away, so the feedback could not be stored") from error
    return Answered(created, described)
