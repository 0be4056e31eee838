"""The "evaluate.speculator" job: what the trainer measured and what steps cost here go to the gate, the run goes on."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any
from uuid import UUID

import structlog

from engine.client import EngineGone
from engine.messages import StepCost
from engine.sync_client import SyncEngineClient
from services.settings import Settings
from services.store import deployments, failpoints, runs
from services.store.jobs import JobCancelled, JobFailed, JobWaits, Lease
from worker.gate.speculator import Cost, Drafter, Held, Verdict, judge

CONNECT_SECONDS = 30.0
# What the event of heads keeps of it.
EVENT_FIGURES = ("reasons", "requests", "tau", "incumbent_tau")

log = structlog.get_logger()


def evaluate_speculator_job(lease: Lease, settings: Settings) -> None:
    """Handler of "evaluate.speculator". Raises JobWaits while the engine is away, JobFailed with nothing to judge."""
    run_id = UUID(lease.payload["run_id"])
    measured = _begin(lease, run_id)
    if measured is None:
        return
    try:
        with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
            costs = client.status().costs
    except EngineGone as error:
        raise JobWaits(str(error)) from error
    if lease.cancelled():
        with lease.transaction() as session:
            runs.finish(session, runs.get(session, run_id), "cancelled", "cancelled")
        raise JobCancelled
    verdict = judge_report(measured, costs)
    _conclude(lease, run_id, measured, verdict)
    failpoints.reach("evaluate_speculator.committed")
    log.info("gate decided", promote=verdict.promote, reasons=verdict.reasons)


def _begin(lease: Lease, run_id: UUID) -> dict[str, Any] | None:
    """What the trainer measured; None when the run is over."""
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        if run.state not in runs.UNFINISHED:
            return None
        measured = [event.payload for event in runs.events(session, run_id, limit=10_000) if event.kind == "held_out"]
        if run.artifact_digest is None or not measured:
            reason = "the run has no heads to judge"
            runs.finish(session, run, "failed", "failed", reason)
    if not measured:
        raise JobFailed("the run has no heads to judge")
    return measured[-1]


def judge_report(measured: Mapping[str, Any], costs: list[StepCost]) -> Verdict:
    """The gate on a trainer's report. An incumbent that could not be read any more counts as none."""
    compared = measured["survival"]["incumbent"] is not None
    held = [
        Held(row["group"] or str(place), row["candidate"], row["incumbent"] if compared else 1.0)
        for place, row in enumerate(measured["held_out"])
    ]
    incumbent = _drafter(measured, "incumbent") if compared else None
    return judge(held, _drafter(measured, "candidate"), incumbent, middling(costs))


def _drafter(measured: Mapping[str, Any], name: str) -> Drafter:
    milliseconds = {int(rows): value for rows, value in measured["drafting_ms"][name].items()}
    return Drafter(measured["survival"][name], milliseconds)


def middling(costs: list[StepCost]) -> list[Cost]:
    """The engine's table at its middle length of context."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for cost in costs:
        found[cost.rows, cost.tokens].append(cost.milliseconds)
    return [Cost(rows, tokens, median(values)) for (rows, tokens), values in sorted(found.items())]


def _conclude(lease: Lease, run_id: UUID, measured: Mapping[str, Any], verdict: Verdict) -> None:
    """The decision, and what follows from it, together."""
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        assert run.artifact_digest is not None, "checked at the beginning"
        told = evidence(measured, verdict)
        runs.add_event(session, run_id, "gate", told)
        found = {"run_id": str(run_id), **{name: told[name] for name in EVENT_FIGURES}}
        if verdict.promote:
            deployments.advance(session, run.artifact_digest, "verified", evidence=found)
            payload = {"project_id": str(run.project_id), "digest": run.artifact_digest, "run_id": str(run.id)}
            runs.enter_phase(session, run, "deploying")
            runs.hand_over(session, run, "deploy.speculator", payload)
        else:
            why = "; ".join(verdict.reasons)
            deployments.advance(session, run.artifact_digest, "rejected", reason=why, evidence=found)
            runs.finish(session, run, "succeeded", "refused")
        lease.succeed(session)


def evidence(measured: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """What the decision was made from, as the run's page shows it; the rows are in the event before."""
    incumbent = measured["incumbent_tau"]
    told: dict[str, Any] = {
        "decision": "promote" if verdict.promote else "refuse",
        "reasons": verdict.reasons,
        "requests": len(measured["held_out"]),
        "tau": measured["tau"]["shared"],
        "tau_greedy": measured["tau"]["greedy"],
        "incumbent_tau": incumbent["shared"] if incumbent else None,
        "gain": verdict.gain,
        "low": verdict.interval.low,
        "high": verdict.interval.high,
    }
    for load, (ours, theirs) in verdict.goodput.items():
        told |= {f"goodput_{load}": ours, f"incumbent_goodput_{load}": theirs}
    return told
