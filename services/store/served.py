"""When which weights answered a project: the deployment's history read as spans of time."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from services.store.models import DeploymentEvent

LIVE_KINDS = ("flip", "roll_back")
CANARY = "canary"
# Says something of a canary that goes on.
HELD = "canary_held"


class Span(NamedTuple):
    """`digest` (None: the base) answered as `how` ("live" or "canary") in [since, until); until None: it still does.

    `began_by` and `ended_by` are the kinds of the events at its ends.
    """

    digest: str | None
    how: str
    since: datetime
    until: datetime | None
    generation: int
    began_by: str
    ended_by: str | None


def spans(session: Session, project_id: UUID) -> list[Span]:
    """Oldest first. The base's time before the first change is not among them: nothing says when it began."""
    wanted = DeploymentEvent.kind.in_(LIVE_KINDS) | DeploymentEvent.kind.like("canary%")
    events = session.scalars(
        select(DeploymentEvent).where(DeploymentEvent.project_id == project_id, wanted).order_by(DeploymentEvent.id)
    )
    return read(list(events))


def read(events: list[DeploymentEvent]) -> list[Span]:
    """A change of the live weights ends whatever is on trial; each further word about a canary ends the one before."""
    done: list[Span] = []
    live: DeploymentEvent | None = None
    trial: DeploymentEvent | None = None
    for event in events:
        if event.kind == HELD:
            continue
        if trial is not None:
            done.append(_span(trial, "canary", event))
            trial = None
        if event.kind == CANARY:
            trial = event
        elif event.kind in LIVE_KINDS:
            if live is not None:
                done.append(_span(live, "live", event))
            live = event
    done += [_span(open_, how, None) for open_, how in ((live, "live"), (trial, "canary")) if open_ is not None]
    return sorted(done, key=lambda span: (span.since, span.generation))


def _span(began: DeploymentEvent, how: str, ended: DeploymentEvent | None) -> Span:
    return Span(
        began.to_digest, how, began.at, ended.at if ended else None, began.generation, began.kind,
        ended.kind if ended else None,
    )  # fmt: skip


def live_since(session: Session, project_id: UUID) -> datetime | None:
    """When what serves now went live; None while the base has served from the start."""
    newest = (
        select(DeploymentEvent.at)
        .where(DeploymentEvent.project_id == project_id, or_(*(DeploymentEvent.kind == kind for kind in LIVE_KINDS)))
        .order_by(DeploymentEvent.id.desc())
        .limit(1)
    )
    return session.scalar(newest)
