"""A training run's "train" job: preflight, the trainer process, the artefact, the hand-over to the gate."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.digest import base_digest
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import failpoints, revisions, runs
from services.store.forms import is_supervised
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import Example, InteractionBody
from services.store.runs import TrainParams
from worker.training import artifact, attempt
from worker.training.preflight import Preflight, check
from worker.training.rows import Row
from worker.training.spec import ReferenceRow, Spec

REFERENCE_ROWS = 64

log = structlog.get_logger()


@dataclass(frozen=True)
class Order:
    """What the run asks for, read once."""

    run_id: UUID
    project_id: UUID
    revision_id: UUID
    revision_digest: str
    params: TrainParams


def train_job(lease: Lease, settings: Settings) -> None:
    """Handler of "train". Any number of attempts, killed anywhere, leave one artefact row and one hand-over."""
    run_id = UUID(lease.payload["run_id"])
    try:
        _train(lease, settings, run_id)
    except JobCancelled:
        attempt.finish(lease, run_id, "cancelled", "cancelled", None)
        raise
    except JobFailed as error:
        attempt.finish(lease, run_id, "failed", "failed", str(error))
        raise


def _train(lease: Lease, settings: Settings, run_id: UUID) -> None:
    order = _begin(lease, run_id)
    if order is None:
        return
    attempt.sweep(lease, settings)
    model, tokenizer = _base_model(settings, order.params)
    ready, examples = _preflight(lease, order, tokenizer)
    _stop_if_cancelled(lease)
    failpoints.reach("train.checked")
    work = settings.home / "runs" / str(run_id) / str(lease.fence)
    work.mkdir(parents=True, exist_ok=True)
    base = base_digest(model)
    attempt.run_trainer(lease, run_id, _spec(settings, order, model, base, work, ready.rows, examples), work)
    failpoints.reach("train.trained")
    built = artifact.describe(
        work / "adapter",
        base=base,
        project=order.project_id,
        run=run_id,
        revision=order.revision_digest,
        params=order.params.model_dump(mode="json"),
    )
    artifact.publish(work / "adapter", built, settings.artifacts)
    failpoints.reach("train.renamed")
    _hand_over(lease, order, built)
    failpoints.reach("train.committed")
    shutil.rmtree(work.parent, ignore_errors=True)
    log.info("adapter built", digest=built.digest)


def _begin(lease: Lease, run_id: UUID) -> Order | None:
    """None when the run is over. Raises JobFailed when there is nothing to train on."""
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        if run.state not in runs.UNFINISHED:
            return None
        if run.revision_id is None:
            raise JobFailed("the run has no revision to train on")
        runs.enter_phase(session, run, "checking")
        revision = revisions.get(session, run.revision_id)
        params = TrainParams.model_validate(run.params)
        return Order(run_id, run.project_id, revision.id, revision.digest, params)


def _base_model(settings: Settings, params: TrainParams) -> tuple[Path, Tokenizer]:
    """Directory and tokenizer of the model that serves. Raises JobFailed for what no attempt can mend."""
    if params.rank > settings.adapter_rank:
        raise JobFailed(f"rank {params.rank} does not fit the engine's slots of rank {settings.adapter_rank}")
    try:
        model = settings.model_path
        return model, Tokenizer.load(model)
    except ValueError as error:
        raise JobFailed(str(error)) from error


def _preflight(lease: Lease, order: Order, tokenizer: Tokenizer) -> tuple[Preflight, list[Example]]:
    """The checks and the examples they were made on; the report is on the run before any compute.

    Raises JobFailed when they refuse.
    """
    with lease.sessions() as session:
        train = _examples(session, order, "train")
        held_out = _examples(session, order, "held_out")
        bodies = _bodies(session, [*train, *held_out])
    ready = check(tokenizer, train, held_out, bodies, order.params.max_length)
    with lease.transaction() as session:
        runs.get(session, order.run_id).preflight = ready.report
        runs.add_event(session, order.run_id, "preflight", ready.report)
    if ready.reasons:
        raise JobFailed(f"preflight refused the run: {'; '.join(ready.reasons)}")
    return ready, train


def _examples(session: Session, order: Order, split: str) -> list[Example]:
    """Only answers that are right as they stand: supervision has nothing to take from the others."""
    found = [member.example for member in revisions.members(session, order.revision_id, split)]
    return [example for example in found if is_supervised(example)]


def _bodies(session: Session, examples: Sequence[Example]) -> dict[UUID, InteractionBody]:
    ids = [example.interaction_id for example in examples if example.interaction_id]
    return {body.id: body for body in session.scalars(select(InteractionBody).where(InteractionBody.id.in_(ids)))}


def _spec(
    settings: Settings, order: Order, model: Path, base: str, work: Path, rows: list[Row], examples: list[Example]
) -> Spec:
    lines = (json.dumps({"input_ids": row.input_ids, "labels": row.labels}) for row in rows)
    (work / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prompts = {row.example_id: row.prompt for row in rows}
    reference = [ReferenceRow(e.messages, prompts[str(e.id)]) for e in examples if str(e.id) in prompts]
    return Spec(
        model=str(model),
        base=base,
        rows_file=str(work / "rows.jsonl"),
        out=str(work / "adapter"),
        parent=os.getpid(),
        device=settings.device,
        reference=reference[:REFERENCE_ROWS],
        **order.params.model_dump(mode="json", exclude={"max_length"}),
    )


def _hand_over(lease: Lease, order: Order, built: artifact.Built) -> None:
    with lease.transaction() as session:
        run = runs.get(session, order.run_id)
        artifact.record(session, built, project_id=order.project_id, run_id=order.run_id)
        run.artifact_digest = built.digest
        runs.enter_phase(session, run, "evaluating")
        runs.hand_over(session, run, "evaluate", {"run_id": str(run.id)})
        lease.succeed(session)


def _stop_if_cancelled(lease: Lease) -> None:
    if lease.cancelled():
        raise JobCancelled
