"""Whether a project has drifted since its weights last changed: fewer answers are right, or other things are asked.

`drifted` is what the overview shows and what may start a training.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from services.store import quality, served
from services.store.drift_rules import Drop, Prompt, Shift, dropped, moved
from services.store.pages import first_id

DAY = timedelta(days=1)
DAYS_BEFORE = 7
DAYS_NOW = 3
# Prompts are looked at a few every so often, so that a burst does not stand for a day.
SLOTS = 96
OF_A_SLOT = 4
OPENING = 24


# The first word of the last turn stands for how a prompt begins; it is compared, and never shown.
SOME = text("""
    SELECT one.group_key, one.prompt_tokens, one.tags, one.opening
    FROM unnest(CAST(:lows AS uuid[]), CAST(:highs AS uuid[])) AS slot(low, high)
    CROSS JOIN LATERAL (
        SELECT i.group_key, i.prompt_tokens, i.tags,
            lower(split_part(left(b.messages -> -1 ->> 'content', :letters), ' ', 1)) AS opening
        FROM interaction i LEFT JOIN interaction_body b ON b.id = i.id
        WHERE i.project_id = :project AND i.id >= slot.low AND i.id < slot.high AND i.origin = 'live'
        ORDER BY i.id LIMIT :most
    ) AS one
""")


class Drift(NamedTuple):
    """Something has moved. `kind` is "quality" or "input"; `reason` says what, in words that quote nobody."""

    kind: str
    reason: str
    drop: Drop | None = None
    shift: Shift | None = None


def drifted(session: Session, project_id: UUID, *, now: datetime | None = None) -> Drift | None:
    """Since what serves now went live; None while the base has served from the start, or too little is known.

    Reads some thousand prompts: ask at most every few minutes.
    """
    moment = now or datetime.now(UTC)
    since = served.live_since(session, project_id)
    if since is None:
        return None
    drop = dropped(*_estimates(session, project_id, since, moment))
    if drop is not None:
        return Drift("quality", _drop_in_words(drop), drop=drop)
    shift = moved(_before(session, project_id, since), _now(session, project_id, since, moment))
    return Drift("input", _shift_in_words(shift), shift=shift) if shift is not None else None


# --- quality ----------------------------------------------------------------------------------------------


def _estimates(
    session: Session, project_id: UUID, since: datetime, now: datetime
) -> tuple[quality.Estimate | None, quality.Estimate | None]:
    """Live quality soon after the weights went live, and of late: the last week, or the latter half of less."""
    cut = max(now - quality.RECENT, since + (now - since) / 2)
    before = quality.estimate_quality(session, project_id, since=since, until=cut)
    return before, quality.estimate_quality(session, project_id, since=cut, until=now)


def _drop_in_words(drop: Drop) -> str:
    return (
        f"answers are right less often than after the last deployment: {100 * drop.now:.1f} % of late, "
        f"{100 * drop.before:.1f} % before ({_signed(drop.low)} to {_signed(drop.high)} points)"
    )


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _shift_in_words(shift: Shift) -> str:
    what = {"length": "how long prompts are", "opening": "how prompts begin"}.get(shift.feature, f"the {shift.feature}")
    return (
        f"other things are asked than before the last deployment: {what} has moved (population stability index "
        f"{shift.moved_by:.2f}, beyond {shift.limit:.2f})"
    )


# --- input ------------------------------------------------------------------------------------------------


def _before(session: Session, project_id: UUID, since: datetime) -> Sequence[Sequence[Prompt]]:
    """The days before the deployment, whole ones counted back from it. The weights learned from them."""
    starts = [since - DAY * (place + 1) for place in range(DAYS_BEFORE)]
    days = [_prompts(session, project_id, start, start + DAY) for start in starts]
    return [day for day in days if day]


def _now(session: Session, project_id: UUID, since: datetime, now: datetime) -> Sequence[Prompt]:
    """The last whole days since the deployment. Less than a day is no day: nights ask other things than mornings."""
    whole = min(DAYS_NOW, int((now - since) / DAY))
    ends = [now - DAY * place for place in range(whole)]
    return [prompt for end in ends for prompt in _prompts(session, project_id, end - DAY, end)]


def _prompts(session: Session, project_id: UUID, start: datetime, end: datetime) -> list[Prompt]:
    """A few of each slot of [start, end), one of a group: a session's turns are alike."""
    edges = [first_id(start + (end - start) / SLOTS * place) for place in range(SLOTS + 1)]
    rows = session.execute(
        SOME, {"project": project_id, "lows": edges[:-1], "highs": edges[1:], "most": OF_A_SLOT, "letters": OPENING}
    )
    found = {row.group_key: row for row in rows}
    return [
        Prompt(int(row.prompt_tokens), row.opening or "", {name: str(value) for name, value in row.tags.items()})
        for row in found.values()
    ]
