"""The review queue in figures: what waits, how fast it comes and goes, who works on it, what the next decision needs.

Every query reads by an index and a bounded stretch of time: the page must open in half a second over a long history.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Float, cast, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from services.store import power, quality
from services.store.models import (
    Annotation,
    Dataset,
    Evaluation,
    Project,
    ReviewItem,
    Revision,
    UserAccount,
)
from services.store.reviews import standing
from services.store.sampling import PRECEDENCE

WAITING = ("open", "escalated", "disputed")
FLOW_DAYS = 14
REVIEWERS_DAYS = 7
MOST_REVIEWERS = 50
# Falls in quality, in points, that the page plans for beside the project's own margin.
DROPS = (1.0, 2.0, 5.0)
DEFAULT_MARGIN = 3.0


class Waiting(NamedTuple):
    """What waits, by strategy, and what is beyond the ordinary: escalated, or reviewers disagree."""

    strategies: dict[str, int]
    escalated: int
    disputed: int
    oldest: datetime | None

    @property
    def size(self) -> int:
        return sum(self.strategies.values())


class Share(NamedTuple):
    """A strategy in the mix: its target, its share of the labels of the last 28 days, and what waits."""

    strategy: str
    target: float
    labels: int
    share: float | None
    waiting: int


class Day(NamedTuple):
    """Items that came into the queue and that left it reviewed, in a day that ends at a whole number of days ago."""

    ago: int
    came: int
    left: int


class Overlap(NamedTuple):
    """Held-out answers want two people: how many wait, and how many of these somebody has already judged."""

    share: float
    waiting: int
    half: int


class Reviewer(NamedTuple):
    """Somebody's last seven days. `an_hour` is judgements an hour of active time."""

    user_id: UUID
    name: str
    judged: int
    an_hour: float | None
    median_seconds: float | None
    changed: float


class Drop(NamedTuple):
    """Held-out pairs it takes to see a drop of so many points, and how many more than there are."""

    points: float
    pairs: int
    more: int


class Decision(NamedTuple):
    """What the gate's next look needs. `measured`: the spread of a pair comes from the last comparison."""

    have: int
    margin: Drop
    drops: list[Drop]
    look: int
    measured: bool


def waiting(session: Session, project_id: UUID) -> Waiting:
    """By the index on (project, state)."""
    rows = session.execute(
        select(ReviewItem.strategy, ReviewItem.state, func.count(), func.min(ReviewItem.created_at))
        .where(ReviewItem.project_id == project_id, ReviewItem.state.in_(WAITING))
        .group_by(ReviewItem.strategy, ReviewItem.state)
    ).all()
    strategies: dict[str, int] = {}
    for strategy, _, number, _ in rows:
        strategies[strategy] = strategies.get(strategy, 0) + number
    return Waiting(
        strategies,
        sum(row[2] for row in rows if row[1] == "escalated"),
        sum(row[2] for row in rows if row[1] == "disputed"),
        min((row[3] for row in rows), default=None),
    )


def mix(targets: Mapping[str, float], found: Sequence[quality.Counted], queue: Waiting) -> list[Share]:
    """Every strategy, in order of precedence. `found` are the strata whose labels are counted; what people chose by
    hand is no strategy's."""
    labels = dict.fromkeys(PRECEDENCE, 0)
    for row in found:
        if row.stratum.strategy in labels:
            labels[row.stratum.strategy] += row.stratum.labelled
    total = sum(labels.values())
    return [
        Share(name, targets[name], labels[name], labels[name] / total if total else None, queue.strategies.get(name, 0))
        for name in PRECEDENCE
    ]


def flow(session: Session, project_id: UUID, now: datetime) -> list[Day]:
    """The last FLOW_DAYS, oldest first, by the indexes on (project, created_at) and (project, done_at)."""
    came, left = (_days(session, project_id, column, now) for column in (ReviewItem.created_at, ReviewItem.done_at))
    return [Day(ago, came.get(ago, 0), left.get(ago, 0)) for ago in reversed(range(FLOW_DAYS))]


Moment = InstrumentedAttribute[datetime] | InstrumentedAttribute[datetime | None]


def _days(session: Session, project_id: UUID, column: Moment, now: datetime) -> dict[int, int]:
    ago = func.floor(func.extract("epoch", now - column) / 86_400).label("ago")
    rows = session.execute(
        select(ago, func.count())
        .where(ReviewItem.project_id == project_id, column > now - timedelta(days=FLOW_DAYS), column <= now)
        .group_by(ago)
    )
    return {int(days): number for days, number in rows}


def overlap(session: Session, project_id: UUID, share: float) -> Overlap:
    """Of what waits for two people, by the index of open items."""
    found = session.execute(
        select(func.count(), func.count().filter(ReviewItem.judged > 0)).where(
            ReviewItem.project_id == project_id, ReviewItem.state == "open", ReviewItem.overlap_target > 1
        )
    ).one()
    return Overlap(share, found[0], found[1])


def reviewers(session: Session, project_id: UUID, now: datetime) -> list[Reviewer]:
    """Who judged in the last seven days, the busiest first, by the index on (project, created_at)."""
    seconds = cast(Annotation.active_ms, Float) / 1000
    judged = func.count()
    rows = session.execute(
        select(
            UserAccount.id, UserAccount.name, judged, func.count(Annotation.active_ms), func.sum(seconds),
            func.percentile_cont(0.5).within_group(seconds), func.count().filter(Annotation.verdict != "accept"),
        )
        .join(UserAccount, UserAccount.id == Annotation.author_id)
        .where(
            Annotation.project_id == project_id, Annotation.created_at > now - timedelta(days=REVIEWERS_DAYS),
            Annotation.verdict.in_(("accept", "correct", "reject", "prefer")), standing(),
        )
        .group_by(UserAccount.id)
        .order_by(judged.desc(), UserAccount.name)
        .limit(MOST_REVIEWERS)
    )  # fmt: skip
    return [
        Reviewer(user_id, name, number, timed * 3600 / total if total else None, median, changed / number)
        for user_id, name, number, timed, total, median, changed in rows
    ]


def next_decision(session: Session, project: Project) -> Decision:
    """How many held-out pairs the gate will have and how many it needs, from what the last comparison showed."""
    newest = session.execute(
        select(Revision.held_out_count, Revision.looks, Revision.look_carry, Revision.created_at)
        .join(Dataset, Dataset.id == Revision.dataset_id)
        .where(Dataset.project_id == project.id)
        .order_by(Revision.id.desc())
        .limit(1)
    ).one_or_none()
    since = newest.created_at if newest else None
    labelled = select(func.count()).where(
        ReviewItem.project_id == project.id, ReviewItem.split == "held_out", ReviewItem.state == "done",
        ReviewItem.done_at > since if since is not None else ReviewItem.done_at.is_not(None),
    )  # fmt: skip
    have = (newest.held_out_count if newest else 0) + (session.scalar(labelled) or 0)
    spread = _measured_spread(session, project.id)
    look = (newest.looks if newest else 0) + 1
    margin = float(project.config.get("margin_points", DEFAULT_MARGIN)) or DEFAULT_MARGIN
    carried = newest.look_carry if newest else 0.0
    considered = (margin, *(one for one in DROPS if one != margin))
    drops = [_drop(points, spread, look, carried, have) for points in considered]
    return Decision(have, drops[0], sorted(drops), look, spread is not None)


def _drop(points: float, spread: float | None, look: int, carried: float, have: int) -> Drop:
    assumed = power.spread_of(power.ASSUMED_DISCORDANT, points / 100) if spread is None else spread
    pairs = power.pairs_needed(points / 100, assumed, look=look, carried=carried)
    return Drop(points, pairs, max(0, pairs - have))


def _measured_spread(session: Session, project_id: UUID) -> float | None:
    """The widest slice's, of the last decided comparison of adapters."""
    summary = session.scalar(
        select(Evaluation.summary)
        .where(Evaluation.project_id == project_id, Evaluation.decision != "undecided")
        .where(Evaluation.summary.has_key("slices"))
        .order_by(Evaluation.created_at.desc())
        .limit(1)
    )
    slices = (summary or {}).get("slices") or {}
    spreads = [float(one.get("spread") or 0.0) for one in slices.values()]
    return max(spreads, default=0.0) or None
