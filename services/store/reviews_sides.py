"""The two answers of a pair as sides: which is left is drawn for each person and item, and told to nobody."""

from hashlib import sha256
from uuid import UUID

from services.store.models import InteractionBody, ReviewItem

SIDES = ("left", "right")


def served_left(user_id: UUID, item_id: UUID) -> bool:
    """Whether this person sees the served response of a pair on the left; the same each time they look."""
    return sha256(user_id.bytes + item_id.bytes).digest()[0] % 2 == 0


def meant(side: str | None, user_id: UUID, item_id: UUID) -> str | None:
    """What a side stands for, and what it stands for as a side: the same map both ways. Other words are passed on."""
    order = ("response", "alternative") if served_left(user_id, item_id) else ("alternative", "response")
    there = dict(zip(SIDES, order, strict=True))
    back = {meaning: side for side, meaning in there.items()}
    return (there | back).get(side, side) if side is not None else None


def pair_of(item: ReviewItem, body: InteractionBody, user_id: UUID) -> list[str] | None:
    """The left and the right answer for this person; None for an item with one answer."""
    if item.alternative is None:
        return None
    texts = [body.output, str(item.alternative.get("output", ""))]
    return texts if served_left(user_id, item.id) else texts[::-1]
