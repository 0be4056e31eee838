"""How fast each stream was decoded, with and without drafts, as the log has it; and what became of the heads.

Rates are compared within a stage only: other weights answer at other lengths and in other words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store.models import DeploymentEvent, Interaction, Run, RunEvent

PROBE = "probe-"
STAGES = {
    "start": "at the start",
    "warm": "after 50 requests",
    "adapted": "after training, suffix drafter",
    "heads": "after training, heads live",
}
# A rate over fewer tokens says more about the clock than about the machine.
LEAST_TOKENS = 8
FINISHED_WELL = ("stop", "length")
ENDINGS = ("speculator_live", "speculator_rolled_back", "speculator_retired")


class Timed(NamedTuple):
    """One answer's decode rate in tokens/s; `drafted` is False where it was asked to be decoded token by token."""

    finished: datetime
    rate: float
    drafted: bool
    probe: str | None
    adapter: str | None


class Rate(NamedTuple):
    """Median and quartiles of answers' decode rates, tokens/s."""

    median: float
    low: float
    high: float
    answers: int

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.low:,.0f} to {self.high:,.0f}, n = {self.answers:,})"


class Pair(NamedTuple):
    """Answers of one time, split by a hash of their ids; either side is None without answers."""

    drafted: Rate | None
    plain: Rate | None

    @property
    def times(self) -> float | None:
        """How many times faster with drafts, by the medians."""
        return self.drafted.median / self.plain.median if self.drafted and self.plain else None

    def __str__(self) -> str:
        times = f": {self.times:.2f} ×" if self.times else ""
        return f"{self.drafted or 'none'}, without drafts {self.plain or 'none'}{times}"


@dataclass(frozen=True, slots=True)
class Stage:
    """The probe of one stage: prompts nobody sent before, one stream at a time, no other traffic."""

    name: str
    at: datetime
    adapted: bool
    rates: Pair

    @property
    def title(self) -> str:
        return f"{STAGES[self.name]} ({'adapter' if self.adapted else 'base'})"


@dataclass(frozen=True, slots=True)
class Turbo:
    """What drafting earned. `stages` is empty where nothing was probed; `heads` says in words what became of them."""

    timed: list[Timed]
    stages: list[Stage]
    before: Pair
    after: Pair
    heads: str
    heads_live_at: datetime | None


def measure(session: Session, project_id: UUID) -> Turbo:
    """Everything above, from the project's rows."""
    timed = _timed(session, project_id)
    traffic = [row for row in timed if row.probe is None]
    heads, live_at = _heads(session, project_id)
    return Turbo(
        timed=timed,
        stages=stages(timed),
        before=pair([row for row in traffic if row.adapter is None]),
        after=pair([row for row in traffic if row.adapter is not None]),
        heads=heads,
        heads_live_at=live_at,
    )


def rate(rates: Sequence[float]) -> Rate | None:
    """None for no rates."""
    if not rates:
        return None
    low, median, high = (float(value) for value in np.percentile(rates, (25, 50, 75)))
    return Rate(median, low, high, len(rates))


def pair(rows: Sequence[Timed]) -> Pair:
    """Drafted answers beside those without drafts."""
    return Pair(*(rate([row.rate for row in rows if row.drafted is drafted]) for drafted in (True, False)))


def stages(timed: Sequence[Timed]) -> list[Stage]:
    """The stages that were probed, in their order."""
    found = []
    for name in STAGES:
        if rows := [row for row in timed if row.probe == name]:
            found.append(Stage(name, rows[-1].finished, rows[-1].adapter is not None, pair(rows)))
    return found


def _timed(session: Session, project_id: UUID) -> list[Timed]:
    rows = session.execute(
        select(
            Interaction.finished_at, Interaction.completion_tokens, Interaction.latency_ms, Interaction.ttft_ms,
            Interaction.speculated, Interaction.end_user, Interaction.adapter_digest,
        )
        .where(
            Interaction.project_id == project_id, Interaction.origin == "live",
            Interaction.finish_reason.in_(FINISHED_WELL), Interaction.completion_tokens >= LEAST_TOKENS,
            Interaction.latency_ms > Interaction.ttft_ms, Interaction.finished_at.is_not(None),
        )
        .order_by(Interaction.finished_at)
    )  # fmt: skip
    return [
        Timed(
            row.finished_at, 1000 * (row.completion_tokens - 1) / (row.latency_ms - row.ttft_ms), row.speculated,
            row.end_user.removeprefix(PROBE) if (row.end_user or "").startswith(PROBE) else None, row.adapter_digest,
        )
        for row in rows
    ]  # fmt: skip


def _heads(session: Session, project_id: UUID) -> tuple[str, datetime | None]:
    """In words, and when they went live."""
    run = session.scalars(
        select(Run).where(Run.project_id == project_id, Run.kind == "speculator").order_by(Run.created_at.desc())
    ).first()
    if run is None:
        return "not trained", None
    if run.artifact_digest is None or run.state != "succeeded" or run.phase == "refused":
        return f"{run.phase}, not tried on traffic: {_why(session, run)}", None
    events = session.scalars(
        select(DeploymentEvent)
        .where(
            DeploymentEvent.project_id == project_id, DeploymentEvent.kind.in_(ENDINGS),
            (DeploymentEvent.to_digest == run.artifact_digest) | (DeploymentEvent.from_digest == run.artifact_digest),
        )
        .order_by(DeploymentEvent.id)
    ).all()  # fmt: skip
    name = f"heads {run.artifact_digest[:12]}"
    if not events:
        return f"{name} on trial, undecided when the demo ended", None
    if events[0].kind != "speculator_live":
        return f"{name} not promoted: {events[0].reason}", None
    passed = (events[0].at - run.created_at).total_seconds()
    later = f"; then left: {events[-1].reason}" if len(events) > 1 else ""
    return f"{name} live {passed:.0f} s after their training began{_lengths(events[0])}{later}", events[0].at


def _lengths(event: DeploymentEvent) -> str:
    """The trial's figures, where there was a trial."""
    lengths = event.evidence.get("tokens_per_step")
    return f"; tokens a step {lengths[0]:.2f} against {lengths[1]:.2f} on trial" if lengths else ""


def _why(session: Session, run: Run) -> str:
    gate = session.scalars(select(RunEvent).where(RunEvent.run_id == run.id, RunEvent.kind == "gate")).first()
    reasons = [str(reason) for reason in gate.payload["reasons"]] if gate else []
    if run.state == "cancelled":
        return "took longer than the demo waits"
    return run.error or "; ".join(reasons[:1]) or run.state
