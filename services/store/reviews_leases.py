"""Who holds which review item: leases of three minutes, given in the queue's order, renewed and given back.

One clock, Postgres's, so that consoles on machines that disagree never share an item.
"""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy import Select, case, func, or_, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import gold
from services.store.models import Project, ReviewItem
from services.store.reviews_deciding import may_decide
from services.store.reviews_standing import touched_by

LEASE = timedelta(minutes=3)
QUEUES = ("open", "escalated", "disputed")


class LostLease(Conflict):
    """Somebody else holds the item now, or nobody waits for it any more."""

    code = "lost_lease"


def lease(
    session: Session,
    project_id: UUID,
    user_id: UUID,
    count: int = 5,
    *,
    queue: str = "open",
    chance: Callable[[], float] = random.random,
) -> list[ReviewItem]:
    """Hold up to `count` items for someone, those already held included (and renewed, their token unchanged).

    Items somebody else holds or that this person has judged or skipped are never given; in a lead's queue those are,
    where no other lead is left to decide (`may_decide`). `queue` is one of QUEUES; the open one hides gold items among
    the others, each new place one with the project's probability by `chance`.
    """
    if not 1 <= count <= 20:
        raise InvalidRequest("count must be between 1 and 20", param="count")
    if queue not in QUEUES:
        raise InvalidRequest(f"unknown queue {queue!r}: choose one of {', '.join(QUEUES)}", param="queue")
    here = select(ReviewItem).where(ReviewItem.project_id == project_id)
    waiting = here.where(ReviewItem.state == queue)
    mine = or_(ReviewItem.state == queue, gold.held(user_id)) if queue == "open" else ReviewItem.state == queue
    held = here.where(mine, ReviewItem.lease_user_id == user_id, ReviewItem.lease_expires_at > func.now())
    items = _locked(session, held.limit(count), wait=True)
    if len(items) < count:
        unheld = or_(ReviewItem.lease_expires_at.is_(None), ReviewItem.lease_expires_at <= func.now())
        free = waiting.where(unheld, ~touched_by(user_id) if queue == "open" else may_decide(user_id))
        new = _locked(session, free.limit(count - len(items)))
        items += _with_gold(session, project_id, user_id, new, chance) if queue == "open" else new
    _hold(session, items, user_id)
    return items


def _hold(session: Session, items: list[ReviewItem], user_id: UUID) -> None:
    """Lease these locked items, in one statement. What was held keeps its token."""
    if not items:
        return
    session.flush()
    mine = (ReviewItem.lease_user_id == user_id) & ReviewItem.lease_token.is_not(None)
    held = (
        update(ReviewItem)
        .where(ReviewItem.id.in_([item.id for item in items]))
        .values(
            lease_user_id=user_id,
            lease_token=case((mine, ReviewItem.lease_token), else_=func.gen_random_uuid()),
            lease_expires_at=func.now() + LEASE,
        )
        .returning(ReviewItem)
    )
    session.scalars(held, execution_options={"synchronize_session": False, "populate_existing": True}).all()


def _with_gold(
    session: Session, project_id: UUID, user_id: UUID, new: list[ReviewItem], chance: Callable[[], float]
) -> list[ReviewItem]:
    """The new items with gold ones at some places. An empty queue stays empty: it has an end."""
    share = gold.share(session.get_one(Project, project_id))
    places = [place for place in range(len(new)) if chance() < share]
    if not places:
        return new
    unseen = gold.unseen(project_id, user_id).limit(len(places)).with_for_update(skip_locked=True)
    checks = list(session.scalars(unseen, execution_options={"populate_existing": True}))
    at, rest = dict(zip(places, checks, strict=False)), iter(new)
    return [at.get(place) or next(rest) for place in range(len(new))]


def _locked(session: Session, query: Select[ReviewItem], *, wait: bool = False) -> list[ReviewItem]:
    """In the queue's order, locked. Items of others are passed over while locked, one's own waited for."""
    ordered = query.order_by(ReviewItem.priority, ReviewItem.order_hash)
    return list(
        session.scalars(ordered.with_for_update(skip_locked=not wait), execution_options={"populate_existing": True})
    )


def now(session: Session) -> datetime:
    """The database's time, of this transaction."""
    moment = session.scalar(select(func.now()))
    return moment if moment is not None else datetime.now(UTC)


def heartbeat(session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID) -> datetime:
    """Renew a lease and return when it expires now. Raises LostLease when it is no longer this person's."""
    item = held_item(session, project_id, item_id, user_id, lease_token)
    item.lease_expires_at = now(session) + LEASE
    session.flush()
    return item.lease_expires_at


def release(session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID) -> None:
    """Give an item back unjudged, for whoever comes next."""
    clear(held_item(session, project_id, item_id, user_id, lease_token))
    session.flush()


def withdraw(session: Session, item: ReviewItem) -> None:
    """Take an item out of the queue for good, because its text is gone. Its judgements stay."""
    clear(item)
    if gold.is_check(item):  # settled already; only nobody can be checked by it any more
        item.gold = None
    else:
        item.state = "withdrawn"
    session.flush()


def lock_item(session: Session, project_id: UUID, item_id: UUID) -> ReviewItem:
    """An item of the project under its row lock. Raises NotFound."""
    item = session.scalar(
        select(ReviewItem).where(ReviewItem.id == item_id, ReviewItem.project_id == project_id).with_for_update(),
        execution_options={"populate_existing": True},
    )
    if item is None:
        raise NotFound("there is no such review item in this project")
    return item


def held_item(session: Session, project_id: UUID, item_id: UUID, user_id: UUID, lease_token: UUID) -> ReviewItem:
    """The item, locked. Raises NotFound, LostLease."""
    item = lock_item(session, project_id, item_id)
    check_held(item, user_id, lease_token)
    return item


def check_held(item: ReviewItem, user_id: UUID, lease_token: UUID) -> None:
    """Raises LostLease. An expired lease that nobody has taken since is still held: work is not thrown away."""
    if item.state not in QUEUES and not gold.is_check(item):
        raise LostLease(f"this item is {item.state}; nothing more is asked of it")
    if item.lease_user_id != user_id or item.lease_token != lease_token:
        raise LostLease("this item is no longer leased to you; it has gone to another reviewer")


def clear(item: ReviewItem) -> None:
    """Nobody holds it any more. The item must be locked."""
    item.lease_user_id = item.lease_token = item.lease_expires_at = None


def hand_back(session: Session, item: ReviewItem, user_id: UUID) -> None:
    """Lease a locked item to somebody again, unless somebody else holds it meanwhile."""
    moment = now(session)
    if item.lease_expires_at is None or item.lease_expires_at <= moment or item.lease_user_id == user_id:
        item.lease_user_id, item.lease_token, item.lease_expires_at = user_id, uuid4(), moment + LEASE
        session.flush()
