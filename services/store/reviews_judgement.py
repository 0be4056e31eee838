"""What a reviewer may send, checked in two steps: as a text on its own, then against the item it speaks of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from services.errors import Unprocessable
from services.store.models import PREFERENCES, InteractionBody, Project, ReviewItem
from services.store.reviews_standing import COUNTED

SUBMITTED = (*COUNTED, "skip", "escalate")
FOR_PAIRS = ("prefer", "reject", "skip", "escalate")
TEXT_LIMIT = 100_000
COMMENT_LIMIT = 10_000
QUOTE_LIMIT = 2_000
SPANS_LIMIT = 100
SPAN_KEYS = {"start", "end", "quote", "tag"}
UNDO_PREFIX = "undo:"


class Judgement(NamedTuple):
    """What a reviewer sends. `idempotency_key` makes a repeated submit the same submit.

    A span is {"start", "end", "quote", "tag"}: offsets in characters of the response, and what stands between them.
    """

    verdict: str
    idempotency_key: str
    correction: str | None = None
    preference: str | None = None
    tags: Sequence[str] = ()
    spans: Sequence[dict[str, Any]] = ()
    comment: str | None = None
    active_ms: int | None = None


def check_shape(judgement: Judgement) -> None:
    """Raises Unprocessable for a judgement that says nothing or cannot be kept."""
    verdict = judgement.verdict
    if verdict not in SUBMITTED:
        raise Unprocessable(f"unknown verdict {verdict!r}: choose one of {', '.join(SUBMITTED)}", param="verdict")
    if not 1 <= len(judgement.idempotency_key) <= 200 or judgement.idempotency_key.startswith(UNDO_PREFIX):
        raise Unprocessable("idempotency_key must be 1 to 200 characters of your own", param="idempotency_key")
    _check_correction(judgement)
    if (verdict == "prefer") != (judgement.preference is not None):
        raise Unprocessable("a preference goes with the verdict 'prefer' and with no other", param="preference")
    if judgement.preference is not None and judgement.preference not in PREFERENCES:
        raise Unprocessable(f"a preference is one of {', '.join(PREFERENCES)}", param="preference")
    texts = [judgement.idempotency_key, judgement.correction or "", judgement.comment or "", *judgement.tags]
    if not all(storable(text) for text in texts):
        raise Unprocessable("text holds a character that cannot be stored (NUL or half of a surrogate pair)")
    _check_spans(judgement.spans)
    if judgement.active_ms is not None and not 0 <= judgement.active_ms <= 86_400_000:
        raise Unprocessable("active_ms must be between 0 and one day", param="active_ms")


def _check_correction(judgement: Judgement) -> None:
    verdict, correction = judgement.verdict, judgement.correction
    if verdict == "correct" and not (correction and correction.strip()):
        raise Unprocessable("a correction cannot be empty", param="correction")
    if verdict != "correct" and correction is not None:
        raise Unprocessable(f"verdict {verdict!r} takes no correction", param="correction")
    if len(correction or "") > TEXT_LIMIT or len(judgement.comment or "") > COMMENT_LIMIT:
        raise Unprocessable(f"corrections end at {TEXT_LIMIT} characters, comments at {COMMENT_LIMIT}")


def _check_spans(spans: Sequence[dict[str, Any]]) -> None:
    if len(spans) > SPANS_LIMIT:
        raise Unprocessable(f"spans end at {SPANS_LIMIT}", param="spans")
    for span in spans:
        if not set(span) <= SPAN_KEYS or not {"start", "end", "quote"} <= set(span):
            raise Unprocessable("a span is {start, end, quote, tag}", param="spans")
        start, end, quote, tag = span["start"], span["end"], span["quote"], span.get("tag")
        if not (_whole(start) and _whole(end) and 0 <= start < end):
            raise Unprocessable("a span starts at 0 or later and ends behind its start", param="spans")
        if not (isinstance(quote, str) and (tag is None or isinstance(tag, str))):
            raise Unprocessable("a span's quote and tag are text", param="spans")
        if len(quote) > QUOTE_LIMIT or not storable(quote):
            raise Unprocessable(f"a span quotes at most {QUOTE_LIMIT} storable characters", param="spans")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def storable(text: str) -> bool:
    """Whether Postgres keeps the text."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def check_content(session: Session, item: ReviewItem, judgement: Judgement, *, decides: bool) -> None:
    """Raises Unprocessable for what does not fit the item, its response or its project's tags, or, where it `decides`
    what others could not agree on, does not say why."""
    _check_tags(session.get_one(Project, item.project_id), judgement)
    if item.alternative is None and judgement.verdict == "prefer":
        raise Unprocessable("this item has one response; there is nothing to prefer it to", param="verdict")
    if item.alternative is not None and judgement.verdict not in FOR_PAIRS:
        raise Unprocessable(f"this item is a pair: choose one of {', '.join(FOR_PAIRS)}", param="verdict")
    if decides:
        _check_decision(judgement)
    body = session.get(InteractionBody, item.interaction_id)
    if body is None:
        return
    if judgement.verdict == "correct" and body.output == judgement.correction:
        raise Unprocessable("the correction equals the response; accept it instead", param="correction")
    if any(body.output[span["start"] : span["end"]] != span["quote"] for span in judgement.spans):
        raise Unprocessable("a span does not quote what stands there in the response", param="spans")


def _check_tags(project: Project, judgement: Judgement) -> None:
    used = {*judgement.tags, *(span["tag"] for span in judgement.spans if span.get("tag") is not None)}
    unknown = sorted(used - set(project.config.get("tags", [])))
    if unknown:
        raise Unprocessable(f"this project has no tag {', '.join(unknown)}", param="tags")


def _check_decision(judgement: Judgement) -> None:
    """Whoever settles a dispute says why: the next reviewers learn from it."""
    if judgement.verdict == "escalate":
        raise Unprocessable("this item is yours to decide; skip it to leave it to another lead", param="verdict")
    if judgement.verdict in COUNTED and not (judgement.comment or "").strip():
        raise Unprocessable("say in the comment why you decide so", param="comment")
