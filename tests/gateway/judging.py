"""Judging an answer that a gateway gave, as the review page does: queue it, lease it, submit, perhaps take it back."""

import time
from uuid import UUID, uuid4

from services.store import people, reviews
from services.store.models import Annotation, Interaction, ReviewItem, UserAccount
from tests.gateway.parts import World


def person(world: World, email: str, role: str, project: str = "entities") -> UUID:
    with world.sessions.begin() as session:
        user: UserAccount = people.create_user(session, email=email)
        people.grant(session, user.id, role, world.projects[project])
        return user.id


def queued(world: World, interaction_id: str, *, overlap: int = 1, split: str = "train", group: str = "") -> UUID:
    """A review item for an answer, once it has landed."""
    logged = world.interaction(interaction_id).interaction
    with world.sessions.begin() as session:
        item = ReviewItem(
            project_id=logged.project_id, interaction_id=logged.id, strategy="uniform", window="w", stratum_size=1,
            priority=0, order_hash="0", split=split, group_key=group or logged.group_key, overlap_target=overlap,
        )  # fmt: skip
        session.add(item)
        session.flush()
        return item.id


def judge(world: World, item_id: UUID, user_id: UUID, verdict: str, correction: str | None = None) -> UUID:
    """Submit under a lease of one's own. Returns the annotation's id."""
    with world.sessions.begin() as session:
        item = session.get_one(ReviewItem, item_id)
        item.lease_user_id, item.lease_token = user_id, uuid4()
        session.flush()
        said = reviews.Judgement(verdict=verdict, idempotency_key=uuid4().hex, correction=correction)
        stored = reviews.submit(session, item.project_id, item_id, user_id, item.lease_token, said)
        annotation: Annotation = stored.annotation
        return annotation.id


def undo(world: World, user_id: UUID, annotation_id: UUID) -> None:
    with world.sessions.begin() as session:
        annotation = session.get_one(Annotation, annotation_id)
        reviews.undo(session, annotation.project_id, user_id, annotation_id)


def origin_of(world: World, interaction_id: str) -> str:
    logged: Interaction = world.interaction(interaction_id).interaction
    return logged.origin


def seconds_until(condition, limit: float = 5.0) -> float:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """How long it took for the condition to hold; fails after `limit`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, f"not so within {limit} s"
        time.sleep(0.01)
    return time.monotonic() - began
