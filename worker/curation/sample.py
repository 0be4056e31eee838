"""Fills the review queue: samples every closed time window once, by the plan of `strata`.

A window is closed when its end, and a grace for answers still being written, have passed. What lands or is said
later moves nothing that was assigned.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import Float, case, cast, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.settings import Settings
from services.store import quality
from services.store.base import uuid7, uuid7_time
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import Annotation, Deployment, Interaction, Project, ReviewItem
from services.store.sampling import CHOSEN, STAMP, Plan
from worker.curation import second
from worker.curation.frame import Window, frame, id_floor, in_window, reviewable
from worker.curation.second import Second
from worker.curation.split import Chosen, assign
from worker.curation.strata import Placed, order_hash, plan

log = structlog.get_logger()


class Wanted(NamedTuple):
    """The prompts to ask again, and whom: the candidate on trial, or what serves."""

    asked: list[second.Asked]
    adapter: str | None
    candidate: bool


def sample_job(lease: Lease, settings: Settings) -> None:
    """Handler of "review.sample": every closed window not sampled yet, then the probabilities as realised.

    The engine is asked between the transactions, so that nobody waits for it on the project's row. `now` is one moment
    for both, that they see the same windows.
    """
    project_id, now = UUID(lease.payload["project_id"]), datetime.now(UTC)
    try:
        with lease.transaction() as session:
            wanted = to_ask(session, project_id, now)
        seconds = second.ask(
            settings, wanted.asked, wanted.adapter, candidate=wanted.candidate, alive=lambda: _alive(lease)
        )
        with lease.transaction() as session:
            seconds = {**second.shadowed(session, project_id), **seconds}
            added = sample(session, project_id, now=now, seconds=seconds)
            realised(session, project_id)
            estimate = quality.estimate_quality(session, project_id, since=now - quality.RECENT)
    except (ValueError, NotFound) as error:
        raise JobFailed(f"cannot sample: {error}") from error
    log.info(
        "sampled", project_id=str(project_id), items=added, seconds=len(seconds),
        quality=estimate._asdict() if estimate else None,
    )  # fmt: skip


def _alive(lease: Lease) -> None:
    if lease.cancelled():
        raise JobCancelled


def to_ask(session: Session, project_id: UUID, now: datetime) -> Wanted:
    """The configured share of the windows about to be sampled, by hash, up to `second.MOST_ASKED` prompts."""
    project = session.get(Project, project_id, populate_existing=True)
    if project is None:
        raise NotFound(f"no project {project_id}")
    chosen, deployment = Plan.of(project.config), session.get(Deployment, project_id)
    candidate = deployment.canary_digest if deployment else None
    share = chosen.second_share
    if share is None:
        share = second.CANDIDATE_SHARE if candidate else 0.0
    ids: list[UUID] = []
    for window in _closed_windows(session, project_id, chosen, now) if share else ():
        found = session.scalars(select(Interaction.id).where(*in_window(project_id, window)))
        hashed = sorted((order_hash(f"second/{_salt(project_id, window)}", one), one) for one in found)
        ids += [one for value, one in hashed if int(value[:16], 16) < share * 2**64]
    adapter = candidate or (deployment.active_digest if deployment else None)
    return Wanted(second.read(session, ids[: second.MOST_ASKED]), adapter, candidate is not None)


def sample(
    session: Session, project_id: UUID, *, now: datetime | None = None, seconds: Mapping[UUID, Second] | None = None
) -> int:
    """Add the items of every closed window that has none yet; returns how many. Running it again adds nothing."""
    # Two samplers would each see a window without items. FOR NO KEY UPDATE lets rows that refer to the project in.
    locked = select(Project).where(Project.id == project_id).with_for_update(key_share=True)
    project = session.scalar(locked.execution_options(populate_existing=True))
    if project is None:
        raise NotFound(f"no project {project_id}")
    chosen, known, added = Plan.of(project.config), seconds or {}, 0
    for window in _closed_windows(session, project_id, chosen, now or datetime.now(UTC)):
        salt = _salt(project_id, window)
        picked = _adopt(session, project_id, window)
        candidates = frame(session, project_id, window, salt, response_schema=chosen.response_schema, seconds=known)
        drawn = [one for one in candidates if one.interaction_id not in picked]
        placed = plan(salt, drawn, budget=chosen.budget, mix=chosen.mix)
        added += _insert(session, project_id, window, placed, chosen.held_out_share, known)
    return added


def _adopt(session: Session, project_id: UUID, window: Window) -> set[UUID]:
    """Make what people have already put in the queue by hand a stratum of the window, and return its answers.

    People pick what looks wrong. Left in the stratum it would else have been in, a picked answer could not be drawn
    for it any more, and what is drawn of the rest would look better than the whole.
    """
    mine = (
        ReviewItem.project_id == project_id, ReviewItem.strategy == CHOSEN, ReviewItem.state != "withdrawn",
        ReviewItem.interaction_id >= id_floor(window.start), ReviewItem.interaction_id < id_floor(window.end),
    )  # fmt: skip
    picked = set(session.scalars(select(ReviewItem.interaction_id).where(*mine)))
    if picked:
        stratum = update(ReviewItem).where(*mine).values(window=window.label, stratum_size=len(picked))
        session.execute(stratum.execution_options(synchronize_session=False))
    return picked


def _salt(project_id: UUID, window: Window) -> str:
    return f"{project_id}/{window.label}"


def _closed_windows(session: Session, project_id: UUID, chosen: Plan, now: datetime) -> Iterator[Window]:
    """Windows aligned to the clock, from the last sampled one on; stretches without traffic are skipped."""
    sampled = (ReviewItem.project_id == project_id, quality.sampled())
    last = session.scalar(select(func.max(ReviewItem.window)).where(*sampled))
    resume = datetime.strptime(last.split("/")[1], STAMP).replace(tzinfo=UTC) if last else None
    closed_at = now - timedelta(seconds=chosen.grace_seconds)
    while True:
        first = _first_after(session, project_id, resume)
        if first is None:
            return
        index = int(first.timestamp()) // chosen.window_seconds
        start, end = (datetime.fromtimestamp(k * chosen.window_seconds, UTC) for k in (index, index + 1))
        if end > closed_at:
            return
        # After a change of window_seconds the last sampled window may reach into this one.
        yield Window(max(start, resume) if resume else start, end)
        resume = end


def _first_after(session: Session, project_id: UUID, start: datetime | None) -> datetime | None:
    wanted = select(Interaction.id).where(*reviewable(project_id)).order_by(Interaction.id).limit(1)
    if start is not None:
        wanted = wanted.where(Interaction.id >= id_floor(start))
    first = session.scalar(wanted)
    return uuid7_time(first) if first is not None else None


def _insert(
    session: Session,
    project_id: UUID,
    window: Window,
    placed: Sequence[Placed],
    held_out_share: float,
    seconds: Mapping[UUID, Second],
) -> int:
    if not placed:
        return 0
    chosen = [Chosen(item.candidate.interaction_id, item.candidate.group_key) for item in placed]
    sides = assign(session, project_id, chosen, held_out_share)
    rows: list[dict[str, Any]] = []
    for item in placed:
        split = sides[item.candidate.interaction_id]
        rows.append(
            {
                "id": uuid7(), "project_id": project_id, "interaction_id": item.candidate.interaction_id,
                "strategy": item.strategy, "window": window.label, "stratum_size": item.stratum_size,
                "priority": item.priority, "order_hash": item.order_hash, "split": split,
                "group_key": item.candidate.group_key, "overlap_target": 2 if split == "held_out" else 1,
                "state": "open",
            } | _pair(item, seconds)
        )  # fmt: skip
    made = session.scalars(
        insert(ReviewItem).on_conflict_do_nothing(index_elements=["interaction_id"]).returning(ReviewItem.id), rows
    )
    return len(made.all())


def _pair(item: Placed, seconds: Mapping[UUID, Second]) -> dict[str, Any]:
    """Only the stratum of disagreements holds pairs: elsewhere a preference would stand for a judgement."""
    pair = seconds.get(item.candidate.interaction_id) if item.strategy == "disagreement" else None
    return {"alternative": pair.alternative if pair else None}


def realised(session: Session, project_id: UUID) -> None:
    """Store π of every item: the labelled part of its stratum over the stratum's size. Only what changed is written."""
    judged = select(Annotation.id).where(Annotation.review_item_id == ReviewItem.id, quality.counted())
    labelled = (
        select(
            ReviewItem.window,
            ReviewItem.strategy,
            func.sum(case((judged.exists(), 1), else_=0)).label("labelled"),
        )
        # What people chose by hand after its window had closed has no probability: nothing is estimated from it.
        .where(ReviewItem.project_id == project_id, quality.sampled())
        .group_by(ReviewItem.window, ReviewItem.strategy)
        .subquery()
    )
    share = cast(labelled.c.labelled, Float) / ReviewItem.stratum_size
    session.execute(
        update(ReviewItem)
        .where(
            ReviewItem.project_id == project_id,
            ReviewItem.window == labelled.c.window,
            ReviewItem.strategy == labelled.c.strategy,
            ReviewItem.probability.is_distinct_from(share),
        )
        .values(probability=share)
        .execution_options(synchronize_session=False)
    )
