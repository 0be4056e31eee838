"""One thing done to many interactions: send to review, tag, withdraw from review. In batches, and undone exactly.

What is done is recorded in the transaction that does it, so that an undo restores what was there and leaves alone what
somebody has changed since.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import UUID as SqlUUID
from sqlalchemy import ColumnElement, Select, any_, cast, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound, Unprocessable
from services.store import jobs
from services.store.base import uuid7
from services.store.models import Annotation, BulkAction, BulkChange, Interaction, Job, ReviewItem
from services.store.search import Search, newest, parsed

MOST = 100_000
SAMPLES = 5
COUNT_SECONDS = 5.0
BATCH_SECONDS = 60.0
WAITING = ("open", "escalated", "disputed")
REVIEWABLE = ("stop", "length")
LONGEST_TAG = 100
UNFINISHED = ("queued", "running", "undoing")


class Selection(NamedTuple):
    """Which interactions: those named, or all that a search finds between two ids (its window of time, frozen)."""

    search: Search
    ids: tuple[UUID, ...] = ()
    since: UUID | None = None
    before: UUID | None = None

    @classmethod
    def frozen(cls, search: Search, ids: Sequence[UUID]) -> "Selection":
        """As it stands now: what lands later is none of it."""
        if ids:
            return cls(search, tuple(sorted(set(ids), reverse=True)))
        return cls(search, (), search.start, uuid7())

    def stored(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "search": dict(self.search.stored), "ids": [str(one) for one in self.ids],
            "since": str(self.since) if self.since else None, "before": str(self.before) if self.before else None,
        }  # fmt: skip

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "Selection":
        """From JSON."""
        since, before = stored["since"], stored["before"]
        return cls(
            parsed(stored["search"]), tuple(UUID(one) for one in stored["ids"]),
            UUID(since) if since else None, UUID(before) if before else None,
        )  # fmt: skip

    def take(self, session: Session, project_id: UUID, place: UUID | None, limit: int, seconds: float) -> list[UUID]:
        """The next of them below `place`, newest first. Ids of other projects are none of them."""
        if self.ids:
            wanted = [one for one in self.ids if place is None or one < place][:limit]
            own = set(
                session.scalars(
                    select(Interaction.id).where(Interaction.project_id == project_id, Interaction.id.in_(wanted))
                )
            )
            return [one for one in wanted if one in own]
        search = replace(self.search, window="all")
        found = newest(
            session, project_id, search, before=place or self.before, since=self.since, limit=limit, seconds=seconds
        )
        if found.back_to is not None and len(found.ids) < limit:
            raise Unprocessable("finding these answers takes too long; choose a shorter time or fewer filters")
        return found.ids


class Preview(NamedTuple):
    """What an action would do: how many it found, how many of those it changes, and the first few."""

    found: int
    changing: int
    samples: list[UUID]


# --- asking for one ---------------------------------------------------------------------------------------


def checked(kind: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters a kind needs. Raises InvalidRequest."""
    if kind in ("review", "withdraw"):
        return {}
    if kind != "tag":
        raise InvalidRequest("a bulk action is review, tag or withdraw", param="kind")
    name, _, value = str(params.get("tag", "")).replace("\x00", "").partition("=")
    name, value = name.strip(), value.strip() or "yes"
    if not name or len(name) > LONGEST_TAG or len(value) > LONGEST_TAG:
        raise InvalidRequest(f"a tag is a name, or name=value, of up to {LONGEST_TAG} characters each", param="tag")
    return {"name": name, "value": value}


def preview(session: Session, project_id: UUID, kind: str, params: Mapping[str, Any], selection: Selection) -> Preview:
    """Counted, not guessed. Raises Unprocessable for more than MOST, or when counting takes too long."""
    ids = selection.take(session, project_id, None, MOST + 1, COUNT_SECONDS)
    if len(ids) > MOST:
        raise Unprocessable(f"more than {MOST:,} answers fit; narrow the search to act on fewer")
    changing = session.scalar(select(func.count()).select_from(_affected(kind, params, ids).subquery())) or 0
    return Preview(len(ids), changing, ids[:SAMPLES])


def start(
    session: Session, project_id: UUID, user_id: UUID, kind: str, params: Mapping[str, Any], selection: Selection,
    expected: int,
) -> BulkAction:  # fmt: skip
    """Note the action and queue its job."""
    action = BulkAction(
        id=uuid7(), project_id=project_id, user_id=user_id, kind=kind, params=dict(params),
        selection=selection.stored(), expected=expected, state="queued",
    )  # fmt: skip
    session.add(action)
    session.flush()
    _enqueue(session, action)
    return action


def start_undo(session: Session, project_id: UUID, action_id: UUID) -> BulkAction:
    """Queue the way back. Raises Conflict while it still runs or when it is undone already."""
    action = get(session, project_id, action_id, lock=True)
    if action.state not in ("done", "failed"):
        raise Conflict(f"this action is {action.state}; there is nothing to undo now")
    action.state, action.place, action.finished_at, action.error = "undoing", None, None, None
    action.restored = action.kept = 0
    session.flush()
    _enqueue(session, action)
    return action


def _enqueue(session: Session, action: BulkAction) -> None:
    job = jobs.enqueue(
        session, "interactions.bulk", {"action_id": str(action.id)}, project_id=action.project_id,
        dedupe_key=f"bulk:{action.id}:{action.state}", priority=10,
    )  # fmt: skip
    action.job_id = job.id
    session.flush()


def get(session: Session, project_id: UUID, action_id: UUID, *, lock: bool = False) -> BulkAction:
    """One action of a project. Raises NotFound."""
    query = select(BulkAction).where(BulkAction.id == action_id, BulkAction.project_id == project_id)
    action = session.scalar(query.with_for_update() if lock else query, execution_options={"populate_existing": True})
    if action is None:
        raise NotFound("there is no such bulk action in this project")
    _settle(session, action)
    return action


def latest(session: Session, project_id: UUID, limit: int = 20) -> list[BulkAction]:
    """A project's last actions, newest first."""
    query = select(BulkAction).where(BulkAction.project_id == project_id)
    actions = list(session.scalars(query.order_by(BulkAction.created_at.desc()).limit(limit)))
    for action in actions:
        _settle(session, action)
    return actions


def _settle(session: Session, action: BulkAction) -> None:
    """An action whose job ended without it has failed with it; what was done stays, and can be undone."""
    if action.state not in UNFINISHED or action.job_id is None:
        return
    job = session.get(Job, action.job_id, populate_existing=True)
    if job is None or job.state in ("failed", "dead", "cancelled"):
        action.state, action.error = "failed", (job.error if job else None) or "its job is gone"
        action.finished_at = datetime.now(UTC)
        session.flush()


# --- what is affected -------------------------------------------------------------------------------------


def _affected(kind: str, params: Mapping[str, Any], ids: Sequence[UUID]) -> Select[Any]:
    """The rows of these that an action changes. An array, because a statement has room for 65,535 parameters only."""
    these = any_(cast(list(ids), ARRAY(SqlUUID)))
    if kind == "withdraw":
        return select(ReviewItem).where(ReviewItem.interaction_id == these, ReviewItem.state.in_(WAITING))
    logged = select(Interaction.id, Interaction.group_key, Interaction.tags).where(Interaction.id == these)
    if kind == "tag":
        return logged.where(Interaction.tags[params["name"]].astext.is_distinct_from(params["value"]))
    chosen = select(ReviewItem.id).where(ReviewItem.interaction_id == Interaction.id).correlate(Interaction)
    return logged.where(Interaction.origin == "live", Interaction.finish_reason.in_(REVIEWABLE), ~chosen.exists())


class Place(NamedTuple):
    """Where an answer goes in the queue when somebody sends it there: its split is its group's, as ever."""

    split: str
    order_hash: str


def to_review(session: Session, action: BulkAction, places: Mapping[UUID, Place]) -> int:
    """Items for these answers, in no stratum: people chose them, no sampling plan did. Those whose time window is still
    open become a stratum of it when it closes."""
    rows = session.execute(select(Interaction.id, Interaction.group_key).where(Interaction.id.in_(places))).all()
    values = [
        {
            "id": uuid7(), "project_id": action.project_id, "interaction_id": one, "strategy": "chosen", "window": "",
            "stratum_size": 1, "priority": 0, "order_hash": places[one].order_hash, "split": places[one].split,
            "group_key": group, "overlap_target": 2 if places[one].split == "held_out" else 1, "state": "open",
        }
        for one, group in rows
    ]  # fmt: skip
    if not values:
        return 0
    made = session.execute(
        insert(ReviewItem).values(values).on_conflict_do_nothing(index_elements=["interaction_id"])
        .returning(ReviewItem.interaction_id, ReviewItem.id)
    ).all()  # fmt: skip
    return _note(session, action, {one: {"item": str(item)} for one, item in made})


def candidates(session: Session, ids: Sequence[UUID]) -> dict[UUID, str]:
    """Of these answers, those that an action sends to review, with the group that decides their split."""
    return {row.id: row.group_key for row in session.execute(_affected("review", {}, ids))}


def tag(session: Session, action: BulkAction, ids: Sequence[UUID]) -> int:
    """Set the tag, keeping what it was."""
    name, value = action.params["name"], action.params["value"]
    rows = session.execute(_affected("tag", action.params, ids).with_for_update()).all()
    for row in rows:
        tags = row.tags | {name: value}
        session.execute(update(Interaction).where(Interaction.id == row.id).values(tags=tags))
    return _note(session, action, {row.id: {"had": name in row.tags, "value": row.tags.get(name)} for row in rows})


def withdraw(session: Session, action: BulkAction, ids: Sequence[UUID]) -> int:
    """Take these out of the queue; whoever holds one is told when they submit it."""
    items = session.scalars(_affected("withdraw", {}, ids).with_for_update()).all()
    before = {item.interaction_id: {"item": str(item.id), "state": item.state} for item in items}
    for item in items:
        item.state = "withdrawn"
        item.lease_user_id = item.lease_token = item.lease_expires_at = None
    session.flush()
    return _note(session, action, before)


def _note(session: Session, action: BulkAction, before: Mapping[UUID, Mapping[str, Any]]) -> int:
    if before:
        rows = [{"action_id": action.id, "interaction_id": one, "before": dict(was)} for one, was in before.items()]
        session.execute(insert(BulkChange).values(rows).on_conflict_do_nothing())
    return len(before)


# --- the way back -----------------------------------------------------------------------------------------


def changes(session: Session, action: BulkAction, limit: int) -> list[BulkChange]:
    """The next changes to undo, newest answer first."""
    query = select(BulkChange).where(BulkChange.action_id == action.id)
    if action.place is not None:
        query = query.where(BulkChange.interaction_id < action.place)
    return list(session.scalars(query.order_by(BulkChange.interaction_id.desc()).limit(limit)))


def restore(session: Session, action: BulkAction, batch: Sequence[BulkChange]) -> int:
    """Put back what these were; returns how many. What has gone on since stays as it is."""
    if action.kind == "tag":
        return sum(_untag(session, action, change) for change in batch)
    items = [UUID(change.before["item"]) for change in batch]
    if action.kind == "review":
        judged = select(Annotation.id).where(Annotation.review_item_id == ReviewItem.id).correlate(ReviewItem)
        free = or_(ReviewItem.lease_expires_at.is_(None), ReviewItem.lease_expires_at <= func.now())
        gone = delete(ReviewItem).where(ReviewItem.id.in_(items), ~judged.exists(), free).returning(ReviewItem.id)
        return len(session.scalars(gone.execution_options(synchronize_session=False)).all())
    return sum(_reopen(session, UUID(change.before["item"]), change.before["state"]) for change in batch)


def _untag(session: Session, action: BulkAction, change: BulkChange) -> int:
    name, value = action.params["name"], action.params["value"]
    row = session.execute(
        select(Interaction.tags).where(Interaction.id == change.interaction_id).with_for_update()
    ).one_or_none()
    if row is None or row.tags.get(name) != value:
        return 0
    tags = {key: kept for key, kept in row.tags.items() if key != name}
    if change.before["had"]:
        tags[name] = change.before["value"]
    session.execute(update(Interaction).where(Interaction.id == change.interaction_id).values(tags=tags))
    return 1


def _reopen(session: Session, item_id: UUID, state: str) -> int:
    still: ColumnElement[bool] = ReviewItem.state == "withdrawn"
    back = update(ReviewItem).where(ReviewItem.id == item_id, still).values(state=state).returning(ReviewItem.id)
    return len(session.scalars(back.execution_options(synchronize_session=False)).all())
