"""The "evaluate" job: candidate and what serves now answer the held-out prompts, the gate decides, the run goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from engine.client import EngineRefused
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import deployments, evaluations, failpoints, revisions, runs
from services.store.forms import is_supervised
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import EvaluationRow, Example, Project
from worker.gate.decide import Decision, Policy, ScoredRow, decide
from worker.gate.metrics import Metric, choose
from worker.gate.score import answer_all, make_prompt

CONNECT_SECONDS = 30.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Order:
    """What is compared on what, read once."""

    run_id: UUID
    project_id: UUID
    revision_id: UUID
    candidate: str
    baseline: str | None
    held_out: Sequence[Example]
    metrics: dict[str, Metric]
    policy: Policy

    @property
    def deciding(self) -> str:
        return next(iter(self.metrics))


class Broken(RuntimeError):
    """The engine refused the artefact itself."""


def evaluate_job(lease: Lease, settings: Settings) -> None:
    """Handler of "evaluate". Raises EngineGone and EvaluationInterrupted for another attempt."""
    run_id = UUID(lease.payload["run_id"])
    try:
        order = _begin(lease, run_id)
        if order is not None:
            rows = _compare(lease, settings, order)
            failpoints.reach("evaluate.scored")
            _conclude(lease, order, rows)
    except Broken as error:
        _quarantine(lease, run_id, str(error))
    except JobCancelled:
        with lease.transaction() as session:
            runs.finish(session, runs.get(session, run_id), "cancelled", "cancelled")
        raise
    except JobFailed as error:
        with lease.transaction() as session:
            runs.finish(session, runs.get(session, run_id), "failed", "failed", str(error))
        raise


def _begin(lease: Lease, run_id: UUID) -> Order | None:
    """None when the run is over. Raises JobFailed when it has nothing to evaluate or the project's policy is wrong."""
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        if run.state not in runs.UNFINISHED:
            return None
        if run.artifact_digest is None or run.revision_id is None:
            raise JobFailed("the run has no artefact to evaluate")
        runs.enter_phase(session, run, "evaluating")
        config = session.get_one(Project, run.project_id).config
        try:
            metrics, policy = choose(config.get("metrics", ["exact_match"])), make_policy(config)
        except (TypeError, ValueError) as error:
            raise JobFailed(f"the project's gate is misconfigured: {error}") from error
        return Order(
            run_id=run_id,
            project_id=run.project_id,
            revision_id=run.revision_id,
            candidate=run.artifact_digest,
            baseline=deployments.get(session, run.project_id).active_digest,
            held_out=_held_out(session, run.revision_id),
            metrics=metrics,
            policy=policy,
        )


def make_policy(config: dict[str, Any]) -> Policy:
    """The project's gate. Raises ValueError."""
    margin = float(config.get("margin_points", 3)) / 100
    groups = int(config.get("min_held_out", Policy.min_groups))
    if not 0 <= margin <= 1 or groups < 2:
        raise ValueError("margin_points must be between 0 and 100, min_held_out at least 2")
    return Policy(margin=margin, min_groups=groups)


def _held_out(session: Session, revision_id: UUID) -> list[Example]:
    """Rows with a golden answer; there is nothing to score the others by."""
    members = revisions.members(session, revision_id, "held_out")
    return [member.example for member in members if is_supervised(member.example)]


def _compare(lease: Lease, settings: Settings, order: Order) -> list[EvaluationRow]:
    """Both sides' answers with their scores."""
    if not order.held_out:
        return []
    tokenizer = Tokenizer.load(_model_directory(settings))
    total = 2 * len(order.held_out)
    with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
        context = client.status().max_context
        prompts = [make_prompt(tokenizer, e.id, e.messages, e.completion or "", context) for e in order.held_out]
        _load(client, settings, [order.candidate, *([order.baseline] if order.baseline else [])])
        ours = answer_all(client, tokenizer, order.candidate, prompts, _progress(lease, order.run_id, 0, total))
        theirs = answer_all(
            client, tokenizer, order.baseline, prompts, _progress(lease, order.run_id, len(prompts), total)
        )
    return [_row(order, example, theirs[example.id], ours[example.id]) for example in order.held_out]


def _model_directory(settings: Settings) -> Path:
    try:
        return settings.model_path
    except ValueError as error:
        raise JobFailed(str(error)) from error


def _load(client: SyncEngineClient, settings: Settings, digests: Sequence[str]) -> None:
    """The candidate first. Raises Broken for it; RuntimeError for another attempt when slots are full."""
    for position, digest in enumerate(digests):
        status = client.status()
        loaded = {slot.digest for slot in status.slots}
        if digest in loaded:
            continue
        if len(loaded) >= status.slots_total:
            raise RuntimeError("every adapter slot of the engine is taken")
        try:
            client.load_adapter(digest, str(settings.artifacts / digest))
        except EngineRefused as error:
            if position == 0 and not error.transient:
                raise Broken(f"the engine refused the adapter: {error}") from error
            raise


def _progress(lease: Lease, run_id: UUID, before: int, total: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        if lease.cancelled():
            raise JobCancelled
        with lease.transaction() as session:
            runs.add_event(session, run_id, "evaluating", {"done": before + done, "total": total}, step=before + done)

    return report


def _row(order: Order, example: Example, baseline: str, candidate: str) -> EvaluationRow:
    golden = example.completion or ""
    return EvaluationRow(
        example_id=example.id,
        slice=example.slice,
        group_key=example.group_key,
        baseline_output=baseline,
        candidate_output=candidate,
        baseline_scores={name: metric(baseline, golden) for name, metric in order.metrics.items()},
        candidate_scores={name: metric(candidate, golden) for name, metric in order.metrics.items()},
    )


def _conclude(lease: Lease, order: Order, rows: list[EvaluationRow]) -> None:
    """Decide, and commit rows, decision, look and what follows from them together."""
    with lease.transaction() as session:
        run = runs.get(session, order.run_id)
        # Concurrent gates on one held-out part must not both take it for their first look.
        looks = revisions.lock_looks(session, order.revision_id)
        decision = decide(_scored(rows, order.deciding), look=looks + 1, policy=order.policy)
        evaluation = evaluations.create(
            session,
            run,
            revision_id=order.revision_id,
            candidate_digest=order.candidate,
            baseline_digest=order.baseline,
        )
        for row in rows:
            row.evaluation_id = evaluation.id
        evaluations.decide(
            session,
            evaluation,
            rows,
            decision="promote" if decision.promote else "refuse",
            reasons=decision.reasons,
            summary=summarise(order, rows, decision),
        )
        runs.add_event(session, order.run_id, "gate", {"promote": decision.promote, "reasons": decision.reasons})
        if decision.promote:
            deployments.advance(session, order.candidate, "verified")
            payload = {"project_id": str(order.project_id), "digest": order.candidate, "run_id": str(order.run_id)}
            runs.enter_phase(session, run, "deploying")
            runs.hand_over(session, run, "deploy", payload)
        else:
            deployments.advance(session, order.candidate, "rejected")
            runs.finish(session, run, "succeeded", "refused")
        lease.succeed(session)
    failpoints.reach("evaluate.committed")
    log.info("gate decided", promote=decision.promote, reasons=decision.reasons, candidate=order.candidate)


def _scored(rows: Sequence[EvaluationRow], metric: str) -> list[ScoredRow]:
    return [
        ScoredRow(row.slice, row.group_key, row.baseline_scores[metric], row.candidate_scores[metric]) for row in rows
    ]


def summarise(order: Order, rows: Sequence[EvaluationRow], decision: Decision) -> dict[str, Any]:
    """The decision's figures, and the plain means of every metric over all rows."""
    means = {
        name: {
            "baseline": sum(row.baseline_scores[name] for row in rows) / len(rows),
            "candidate": sum(row.candidate_scores[name] for row in rows) / len(rows),
        }
        for name in order.metrics
        if rows
    }
    return {"metric": order.deciding, "rows": len(rows), "means": means, **decision.summary()}


def _quarantine(lease: Lease, run_id: UUID, reason: str) -> None:
    """What served goes on serving."""
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        if run.artifact_digest is not None:
            deployments.advance(session, run.artifact_digest, "quarantined")
        runs.finish(session, run, "failed", "quarantined", reason)
    raise JobFailed(reason)
