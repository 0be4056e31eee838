"""A candidate on trial as its page shows it: sentences, the drawing, guardrails, the split, engines, the way back."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.console import rollout_chart
from services.console.access import Here
from services.console.rollout_chart import Gate
from services.console.wording import duration, milliseconds, percent, points, short
from services.store import engine_reports, shadow_answers, trials
from services.store.lifecycle import way_back
from services.store.models import (
    Artifact,
    Deployment,
    DeploymentEvent,
    EngineReport,
    Evaluation,
    Interaction,
    Job,
    Rollout,
)
from services.store.pages import first_id
from services.store.rollout_config import SHARES, SIGNALS, RolloutConfig, read_rollout
from services.store.rollouts import STARTABLE

MOST_STARTABLE = 5
GUARD_WORDS = {
    "few": "too few users yet", "fine": "fine", "worse": "beyond the tolerance, not certain yet", "tripped": "tripped",
}  # fmt: skip
BACK_KINDS = ("roll_back", "canary_rolled_back", "canary_stopped")


class GuardRow(NamedTuple):
    """One guardrail in words."""

    words: str
    difference: str
    interval: str
    tolerance: str
    state: str
    told: str


class Startable(NamedTuple):
    """An artefact that a person may have deployed, and in words what its gate compared it with, where that is not
    what serves now."""

    artifact: Artifact
    stale: str


class Engine(NamedTuple):
    """An engine's last report: whether it is there, and whether it has what this generation may route to it."""

    report: EngineReport
    away: bool
    behind: bool


def context(here: Here, deployment: Deployment, events: Sequence[DeploymentEvent]) -> dict[str, Any]:
    """Everything `rollout.html` and the head of the page use."""
    session = here.session
    trial = trials.latest(session, here.project.id)
    standing = read_rollout(here.project.config)
    config = trials.config_of(trial) if trial else standing
    under_way = trial is not None and trial.stage in trials.OPEN
    pairs = shadow_answers.pairs(session, trial.id) if trial else []
    ordered = session.scalars(
        select(Job).where(Job.project_id == here.project.id, Job.kind == "deploy").order_by(Job.id.desc()).limit(1)
    ).one_or_none()
    return {
        "ordered": ordered if ordered and ordered.state not in ("succeeded", "cancelled") else None,
        "way_back": way_back(session, here.project.id, deployment.active_digest),
        "trial": trial, "under_way": under_way, "rollout": config, "signal_words": SIGNALS[config.signal],
        "shadow": shadow_answers.figures(pairs) if pairs else None,
        "told": told(trial, config) if trial else "",
        "more": more(trial) if trial and trial.stage == "canary" else "",
        "drawn": drawing(trial, config) if trial else None,
        "guards": guard_rows(trial) if trial else [],
        "split": split_words(trial) if trial else "",
        "engines": engines(session, deployment),
        "may_operate": here.may("operator"),
        "may_roll_back": here.may("operator") and (deployment.active_digest is not None or under_way),
        "direct": standing.mode == "direct", "freeze_after": standing.freeze_after,
        "changed_since": under_way and standing != config,
        "startable": _startable(here, deployment.active_digest) if here.may("operator") and not under_way else [],
        "moved": {event.id: moved(session, event) for event in events[:10] if event.kind in BACK_KINDS},
    }  # fmt: skip


def told(trial: Rollout, config: RolloutConfig) -> str:
    """Where the candidate stands, in a sentence or two."""
    if trial.ending is not None:
        return sentence(trial.ending)
    if trial.stage == "shadow":
        return (
            f"Nobody is served by it yet: {config.shadow.requests:,} prompts of live traffic are answered again and "
            "compared with what was served."
        )
    reason = trial.verdict.get("reason")
    if reason is None:
        return "The first users are on their way; nothing has been counted yet."
    return sentence(reason)


def more(trial: Rollout) -> str:
    """How long it is likely to go on."""
    needed = trial.verdict.get("more")
    if not needed:
        return ""
    needed, mine = _roughly(needed), _roughly(needed * trial.share)
    return (
        f"About {needed:,} more requests decide it if it stays like this, {mine:,} of them answered by the candidate."
    )


def _roughly(count: float) -> int:
    """To two digits: more would promise too much."""
    size = int(10 ** max(0, len(str(round(count))) - 2))
    return max(1, math.ceil(count / size) * size)


def drawing(trial: Rollout, config: RolloutConfig) -> rollout_chart.Drawn | None:
    """The sequence with its gates: below the upper one it is rolled back, above the lower one promoted."""
    bar = config.benefit if config.benefit is not None else -config.harm
    gates = [
        Gate("harm", "rolled back when all of it is below", 0.0),
        Gate("pass", "promoted when all of it is above", bar),
    ]
    return rollout_chart.draw(trial.track, gates, share=config.signal in SHARES)


def guard_rows(trial: Rollout) -> list[GuardRow]:
    """The last look's guardrails."""
    return [_guard_row(one) for one in trial.verdict.get("guards", ())]


def _guard_row(one: dict[str, Any]) -> GuardRow:
    found, shares = one["interval"], one["share"]

    def say(value: float) -> str:
        return points(value) if shares else f"{math.exp(value):.2f} ×"

    tolerance = (
        f"{100 * one['tolerance']:g} point{'s' * (one['tolerance'] != 0.01)}"
        if shares
        else f"{math.exp(one['tolerance']):g} ×"
    )
    interval = f"{say(found['low'])} to {say(found['high'])}" if found else ""
    return GuardRow(
        one["words"], say(found["estimate"]) if found else "–", interval, tolerance, one["state"],
        GUARD_WORDS[one["state"]],
    )  # fmt: skip


def split_words(trial: Rollout) -> str:
    """Whether users came to the arms as they were to."""
    ratio = trial.verdict.get("ratio")
    if not ratio or not ratio["canary"] + ratio["control"]:
        return ""
    users = ratio["canary"] + ratio["control"]
    seen = ratio["canary"] / users
    if ratio["off"]:
        return (
            f"{percent(seen)} of {users:,} users came to the candidate where {percent(ratio['share'])} were to: that "
            "is no chance. Something loses requests of one arm, so nothing is decided by the signal."
        )
    told = (
        f"{percent(seen)} of {users:,} users came to the candidate, {percent(ratio['share'])} were to: as it should be"
    )
    if trial.verdict.get("action") == "hold":
        return f"{told} by now. It was not before, so nothing is decided by the signal until somebody acts."
    return f"{told}."


def engines(session: Session, deployment: Deployment) -> list[Engine]:
    """Every engine that reported on this project."""
    now = datetime.now(UTC)
    return [
        Engine(report, now - report.seen_at > engine_reports.AWAY, report.generation < deployment.generation)
        for report in engine_reports.of_project(session, deployment.project_id)
    ]


def moved(session: Session, event: DeploymentEvent) -> str:
    """How fast traffic followed a change: from the log, not from what was intended."""
    began, first = first_id(event.at), Interaction.started_at
    new, old = session.execute(
        select(
            func.min(first).filter(Interaction.generation >= event.generation),
            func.max(first).filter(Interaction.generation < event.generation),
        ).where(
            Interaction.project_id == event.project_id, Interaction.id >= began, Interaction.origin == "live",
        )
    ).one()  # fmt: skip
    if new is None:
        return ""
    after = f"The first request on what it went back to began {_span(new, event.at)} later"
    if old is None or old <= event.at:
        return f"{after}; none began on the old weights any more."
    return f"{after}, the last one on the old weights {_span(old, event.at)}."


def _span(moment: datetime, since: datetime) -> str:
    seconds = max(0.0, (moment - since).total_seconds())
    return milliseconds(1000 * seconds) if seconds < 1 else duration(seconds)


def sentence(text: str) -> str:
    """A reason as a sentence of its own."""
    whole = text[:1].upper() + text[1:]
    return whole if whole.endswith((".", "!", "?")) else f"{whole}."


def _startable(here: Here, active: str | None) -> list[Startable]:
    newest = select(Artifact).where(
        Artifact.project_id == here.project.id, Artifact.kind == "adapter", Artifact.state.in_(STARTABLE),
        Artifact.tainted_at.is_(None),
    )  # fmt: skip
    found = here.session.scalars(newest.order_by(Artifact.created_at.desc()).limit(MOST_STARTABLE))
    return [Startable(artifact, _stale(here.session, artifact, active)) for artifact in found]


def _stale(session: Session, artifact: Artifact, active: str | None) -> str:
    compared = select(Evaluation).where(
        Evaluation.project_id == artifact.project_id, Evaluation.candidate_digest == artifact.digest
    )
    newest = session.scalars(compared.order_by(Evaluation.created_at.desc()).limit(1)).one_or_none()
    if newest is None or newest.baseline_digest == active:
        return ""
    return (
        f"compared with {short(newest.baseline_digest) if newest.baseline_digest else 'the base'}, not what serves now"
    )


def state_words(events: Sequence[list[str]]) -> str:
    """Which artefacts changed state with an event."""
    return ", ".join(f"{short(digest)} {old} → {new.replace('_', ' ')}" for digest, old, new in events)
