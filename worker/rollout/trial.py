"""Looks at every candidate on trial, counts what is new, judges, and carries the judgement out.

All it knows is in Postgres, so that any dispatcher goes on where another one died. A look counts in one transaction and
decides in the next: whoever dies between the two has counted nothing twice, and the next look decides the same.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import engine_reports, failpoints, jobs, rollout_counts, rollouts, shadow_answers, trials
from services.store.base import Sessions
from services.store.lifecycle import locked, record_change
from services.store.models import Project, Rollout
from services.store.rollout_counts import LANDS_WITHIN, QUIET, Arms
from services.store.rollouts import Decision
from worker.rollout import checks, shadow
from worker.rollout.judge import Evidence, Verdict, judge

ACTOR = "rollout"
# Points kept for the drawing; when there are more, every second one goes.
MOST_POINTS = 240

log = structlog.get_logger()


class Trials:
    """Every project's candidate in turn."""

    def __init__(self, *, lands_within: timedelta = LANDS_WITHIN, quiet: timedelta = QUIET) -> None:
        self._lands_within = lands_within
        self._quiet = quiet

    def step(self, sessions: Sessions, now: datetime) -> None:
        """One look at each; a decision that somebody else's change overtook is made again at the next."""
        with sessions() as session:
            looks = [(rollout.id, rollout.stage) for rollout in trials.all_open(session)]
        for rollout_id, stage in looks:
            try:
                if stage == "shadow":
                    _look_at_shadow(sessions, rollout_id)
                elif self._count(sessions, rollout_id, now):
                    _decide(sessions, rollout_id, now)
            except Conflict as conflict:
                log.info("the trial changed meanwhile", rollout=str(rollout_id), error=conflict.message)

    def _count(self, sessions: Sessions, rollout_id: UUID, now: datetime) -> bool:
        """Add what has finished since the last look; whether there is anything to judge."""
        with sessions.begin() as session:
            rollout = session.get_one(Rollout, rollout_id)
            span = rollout_counts.next_span(session, rollout, now, lands_within=self._lands_within, quiet=self._quiet)
            if span.until <= span.since:
                return not rollout.verdict or bool(rollout.verdict.get("lagging"))
            read = _read(session, rollout, span) if rollout.config.get("signal") == "checks" else ()
            rollout_counts.fold(session, rollout, span, read)
        failpoints.reach("canary.counted")
        return True


def _read(session: Session, rollout: Rollout, span: rollout_counts.Span) -> list[tuple[rollout_counts.Output, float]]:
    config = trials.config_of(rollout)
    schema = session.get_one(Project, rollout.project_id).config.get("response_schema")
    found = []
    for output in rollout_counts.outputs(session, rollout, span):
        passed = checks.passes(output.output, output.parameters, config, schema)
        if passed is not None:
            found.append((output, float(passed)))
    return found


# --- the canary --------------------------------------------------------------------------------------------


def _decide(sessions: Sessions, rollout_id: UUID, now: datetime) -> None:
    with sessions.begin() as session:
        project_id = session.get_one(Rollout, rollout_id).project_id
        deployment = locked(session, project_id)
        rollout = trials.open_of(session, project_id, lock=True)
        if rollout is None or rollout.id != rollout_id or rollout.generation != deployment.generation:
            return
        found = evidence(rollout_counts.moments(session, rollout.id), rollout.share)
        held = rollout.verdict.get("reason") if rollout.verdict.get("action") == "hold" else None
        verdict = judge(found, trials.config_of(rollout), held=held)
        lagging = engine_reports.lagging(session, project_id, deployment.generation, rollout.digest, now)
        if verdict.action in ("promote", "wait") and lagging:
            verdict = verdict._replace(action="wait", reason=_told_lagging(verdict, lagging))
        newly_held = verdict.action == "hold" and held is None
        remember(rollout, verdict, found, now)
        rollout.verdict = {**rollout.verdict, "lagging": lagging}
        session.flush()
        if newly_held:
            _hold(session, project_id, rollout, verdict)
        else:
            _carry_out(session, project_id, verdict, deployment.generation)
        failpoints.reach("canary.deciding")
    if verdict.action in ("promote", "roll_back"):
        failpoints.reach("canary.decided")
        log.info("canary decided", rollout=str(rollout_id), action=verdict.action, reason=verdict.reason)


def _told_lagging(verdict: Verdict, lagging: list[str]) -> str:
    engines = ", ".join(lagging)
    if verdict.action == "promote":
        return f"{verdict.reason}; promotion waits for {engines} to load the candidate"
    return (
        f"{verdict.reason}; not loaded in {engines}: if that lasts, another base model or too few adapter slots keep "
        "it out, which counts against nobody, or the engine refuses it, which counts as errors of it"
    )


def evidence(found: Mapping[str, Arms], share: float) -> Evidence:
    """The counts as a judgement wants them."""
    everything = found.get(rollout_counts.ROUTED, Arms(rollout_counts.NONE, rollout_counts.NONE))
    return Evidence(
        metrics=found,
        requests=(everything.canary.n, everything.control.n),
        users=(everything.canary.users, everything.control.users),
        share=share,
    )


def remember(rollout: Rollout, verdict: Verdict, found: Evidence, now: datetime) -> None:
    """Keep a look: its figures for the page, its point for the drawing."""
    document = verdict.document() | {"requests": list(found.requests), "users": list(found.users)}
    arms = found.metrics.get(rollout_counts.SIGNAL)
    if arms is not None:
        document["outcomes"] = [arms.canary.n, arms.control.n]
        document["means"] = [arm.y / arm.w if arm.w else None for arm in arms]
    rollout.looked_at = now
    rollout.verdict = document
    if verdict.signal is None or (rollout.track and rollout.track[-1]["requests"] == sum(found.requests)):
        return
    point = {"requests": sum(found.requests), **{k: round(v, 5) for k, v in verdict.signal._asdict().items()}}
    points = [*rollout.track, point]
    rollout.track = points if len(points) <= MOST_POINTS else [*points[:-1:2], points[-1]]


def _carry_out(session: Session, project_id: UUID, verdict: Verdict, generation: int) -> None:
    decision = Decision(ACTOR, verdict.reason, {}, generation)
    if verdict.action == "promote":
        rollouts.promote(session, project_id, decision)
    elif verdict.action == "roll_back":
        after = rollouts.end(session, project_id, "rolled_back", decision, automatic=True)
        log.error("canary rolled back", alarm=True, project=str(project_id), reason=verdict.reason, frozen=after.frozen)


def _hold(session: Session, project_id: UUID, rollout: Rollout, verdict: Verdict) -> None:
    """Told once: nothing is decided automatically until a person has stopped, restarted or promoted the canary."""
    told: dict[str, Any] = {"users": verdict.ratio.canary + verdict.ratio.control, "share_seen": verdict.ratio.seen}
    record_change(
        session, locked(session, project_id), "canary_held", old=rollout.digest, to=rollout.digest, actor=ACTOR,
        reason=verdict.reason, evidence=told,
    )  # fmt: skip
    log.error("canary held", alarm=True, project=str(project_id), reason=verdict.reason)


# --- the shadow --------------------------------------------------------------------------------------------


def _look_at_shadow(sessions: Sessions, rollout_id: UUID) -> None:
    with sessions.begin() as session:
        project_id = session.get_one(Rollout, rollout_id).project_id
        generation = locked(session, project_id).generation
        rollout = trials.open_of(session, project_id)
        if rollout is None or rollout.id != rollout_id or rollout.stage != "shadow":
            return
        config = trials.config_of(rollout)
        pairs = shadow_answers.pairs(session, rollout_id)
        if len(pairs) < config.shadow.requests:
            _ask_for_more(session, rollout)
            return
        verdict = shadow.judge(pairs, config)
        decision = Decision(ACTOR, verdict.reason, verdict.evidence, generation)
        if verdict.passed:
            rollouts.begin_canary(session, project_id, decision)
        else:
            rollouts.end(session, project_id, "rejected", decision)
        failpoints.reach("shadow.deciding")
    failpoints.reach("shadow.decided")
    log.info("shadow compared", rollout=str(rollout_id), passed=verdict.passed, reason=verdict.reason)


def _ask_for_more(session: Session, rollout: Rollout) -> None:
    """Last in line, as everything a candidate does before it serves anybody."""
    if not shadow.to_ask(session, rollout, limit=1):
        return
    try:
        with session.begin_nested():
            jobs.enqueue(
                session, "shadow", {"rollout_id": str(rollout.id)}, project_id=rollout.project_id,
                dedupe_key=f"shadow:{rollout.id}", priority=-5,
            )  # fmt: skip
    except Conflict:
        log.debug("the shadow is being answered", rollout=str(rollout.id))
