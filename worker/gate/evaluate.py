"""The "evaluate" job: candidate and what serves now answer the held-out prompts, the gate decides, the run goes on."""

from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import structlog

from engine.client import EngineGone, EngineRefused
from engine.messages import Status
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import deployments, evaluation_answers, evaluations, failpoints, revisions, runs, verdicts
from services.store.gate_words import evidence, shown
from services.store.jobs import JobCancelled, JobFailed, JobWaits, Lease
from services.store.models import EvaluationRow, Run
from worker.gate.asking import Asking
from worker.gate.decide import decide
from worker.gate.judge import Agreement
from worker.gate.order import Order, read
from worker.gate.report import judge_agreement, summarise, told
from worker.gate.rows import Compared, asked_of, make_rows, recorded, scored
from worker.gate.score import EngineCrowded, weights_of

CONNECT_SECONDS = 30.0
log = structlog.get_logger()


class Broken(RuntimeError):
    """The engine refused the artefact itself."""


class EngineAway(RuntimeError):
    """No engine answers, and nothing was asked of one in this attempt."""


class Result(NamedTuple):
    """Rows ready to be stored, and what the judge was worth."""

    rows: list[EvaluationRow]
    judged: Agreement | None


def evaluate_job(lease: Lease, settings: Settings) -> None:
    """Handler of "evaluate". Raises JobWaits while the engine is away or crowded; EngineGone and EvaluationInterrupted,
    which cost an attempt, when it is lost on the way: the candidate may be what it died of."""
    run_id = UUID(lease.payload["run_id"])
    try:
        order = _begin(lease, settings, run_id)
        if order is not None:
            result = _compare(lease, settings, order)
            failpoints.reach("evaluate.scored")
            _conclude(lease, order, result)
    except Broken as error:
        _quarantine(lease, run_id, str(error))
    except (EngineAway, EngineCrowded) as error:
        with lease.transaction() as session:
            runs.add_event(session, run_id, "log", {"line": f"waits for the engine: {error}"})
        raise JobWaits(str(error)) from error
    except JobCancelled:
        with lease.transaction() as session:
            runs.finish(session, runs.get(session, run_id), "cancelled", "cancelled")
        raise
    except JobFailed as error:
        with lease.transaction() as session:
            runs.finish(session, runs.get(session, run_id), "failed", "failed", str(error))
        raise


def _begin(lease: Lease, settings: Settings, run_id: UUID) -> Order | None:
    """None when the run is over. Raises JobFailed when it has nothing to evaluate or the project's policy is wrong."""
    model = _model_directory(settings)
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        if run.state not in runs.UNFINISHED:
            return None
        if run.artifact_digest is None or run.revision_id is None:
            raise JobFailed("the run has no artefact to evaluate")
        runs.enter_phase(session, run, "evaluating")
        _require_rendering(run, model)
        try:
            return read(session, run, model)
        except (TypeError, ValueError) as error:
            raise JobFailed(f"the project's gate is misconfigured: {error}") from error


def _require_rendering(run: Run, model: Path) -> None:
    """What was trained on prompts of another template or tokenizer loads like any other, and is asked otherwise than
    it learned. A run may have been trained on another machine, from files that only differ there."""
    trained = (run.preflight or {}).get("template")
    if not trained:
        return
    ours = Tokenizer.load(model)
    if (trained["tokenizer"], trained["template"]) != (ours.digest, ours.template_digest):
        raise JobFailed(
            f"{runs.TEMPLATE_DRIFT}the trainer rendered prompts with other files than serve here; train again"
        )


def _model_directory(settings: Settings) -> Path:
    try:
        return settings.model_path
    except ValueError as error:
        raise JobFailed(str(error)) from error


# --- asking the engine ------------------------------------------------------------------------------------


def _compare(lease: Lease, settings: Settings, order: Order) -> Result:
    """Both sides' answers with their scores; where nothing is held out, what the candidate says to a few prompts."""
    if not order.held_out and not order.record:
        return Result([], None)
    tokenizer = Tokenizer.load(_model_directory(settings))
    with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
        try:
            client.status()
        except EngineGone as error:
            raise EngineAway(str(error)) from error
        asking = Asking(lease, order, client, tokenizer)
        # Each when its turn comes: slots that others want are held no longer than they are used.
        _load(client, settings, order, order.candidate)
        if not order.held_out:
            said = asking.record()
            return Result([recorded(one, said[one.id]) for one in order.record], None)
        ours = asking.sides(order.candidate)
        _load(client, settings, order, order.baseline)
        theirs = asking.sides(order.baseline)
        _load(client, settings, order, order.judging.adapter if order.judging else None)
        compared = asking.judge([Compared(one, theirs[one.id], ours[one.id]) for one in order.examples])
        weights = [weights_of(client.status(), adapter) for adapter in (order.candidate, order.baseline)]
    with lease.transaction() as session:
        human = verdicts.of_outputs(session, order.project_id, asked_of(compared))
        evaluation_answers.forget(session, order.project_id, except_of=weights)
    judged = judge_agreement(compared, human) if order.judging else None
    return Result(make_rows(order, compared, human), judged)


def _load(client: SyncEngineClient, settings: Settings, order: Order, digest: str | None) -> None:
    """Have an adapter ready; the engine lets an idle one go for it. Raises Broken for the candidate, EngineCrowded."""
    if digest is None:
        return
    status = client.status()
    if digest not in {slot.digest for slot in status.slots} and not _has_room(status):
        raise EngineCrowded("every adapter slot of the engine serves requests")
    try:
        client.load_adapter(digest, str(settings.artifacts / digest))
    except EngineRefused as error:
        if digest == order.candidate and not error.transient:
            raise Broken(f"the engine refused the adapter: {error}") from error
        raise


def _has_room(status: Status) -> bool:
    """Whether a load takes no slot from an adapter with requests: the engine would make one of those leave for it.
    One that is idle is loaded again when a request asks for it."""
    free = len(status.slots) < status.slots_total
    return free or any(slot.state == "ready" and not slot.references for slot in status.slots)


# --- deciding ---------------------------------------------------------------------------------------------


def _conclude(lease: Lease, order: Order, result: Result) -> None:
    """Decide, and commit rows, decision, look and what follows from them together."""
    with lease.transaction() as session:
        run = runs.get(session, order.run_id)
        # Concurrent gates on one held-out part must not both take it for their first look.
        looks = revisions.lock_looks(session, order.revision_id)
        table = scored(result.rows, order.deciding)
        decision = decide(table, look=looks.taken + 1, carried=looks.carry, policy=order.policy)
        evaluation = evaluations.create(
            session,
            run,
            revision_id=order.revision_id,
            candidate_digest=order.candidate,
            baseline_digest=order.baseline,
        )
        summary = summarise(order, result.rows, decision, result.judged)
        for row in result.rows:
            row.evaluation_id = evaluation.id
        evaluations.decide(
            session,
            evaluation,
            result.rows,
            decision="promote" if decision.promote else "refuse",
            reasons=told(order, decision),
            summary=summary,
            tested=decision.tested,
            carry=decision.carry,
        )
        runs.add_event(session, order.run_id, "gate", {"promote": decision.promote, "reasons": decision.reasons})
        if decision.promote:
            why, found = shown(summary), evidence(evaluation)
            deployments.advance(session, order.candidate, "verified", reason=why, evidence=found)
            payload = {"project_id": str(order.project_id), "digest": order.candidate, "run_id": str(order.run_id)}
            runs.enter_phase(session, run, "deploying")
            runs.hand_over(session, run, "deploy", payload)
        else:
            why, found = "; ".join(decision.reasons), evidence(evaluation)
            deployments.advance(session, order.candidate, "rejected", reason=why, evidence=found)
            runs.finish(session, run, "succeeded", "refused")
        lease.succeed(session)
    failpoints.reach("evaluate.committed")
    log.info("gate decided", promote=decision.promote, reasons=decision.reasons, candidate=order.candidate)


def _quarantine(lease: Lease, run_id: UUID, reason: str) -> None:
    """What served goes on serving."""
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        if run.artifact_digest is not None:
            found = {"run_id": str(run_id)}
            deployments.advance(session, run.artifact_digest, "quarantined", reason=reason, evidence=found)
        runs.finish(session, run, "failed", "quarantined", reason)
    raise JobFailed(reason)
