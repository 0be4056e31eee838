"""A training run's "train" job: preflight, the trainer process, the artefact, the hand-over to the gate."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec
import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.digest import base_digest
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import engine_reports, failpoints, revisions, runs, traffic
from services.store.copying import among
from services.store.held_out import of_examples, warning
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import Example, InteractionBody, Project
from services.store.run_params import TrainParams, adapter_params
from services.store.traffic import Rendering
from worker.training import artifact, attempt, checkpoints
from worker.training.loading import require_quantizer
from worker.training.parting import draw, parted, sum_usable, write_lines
from worker.training.preflight import Preflight, check, rendering_since
from worker.training.process import Refused
from worker.training.rows import arranged, asked_of
from worker.training.spec import ReferenceRow, Spec

REFERENCE_ROWS = 64

log = structlog.get_logger()


@dataclass(frozen=True)
class Order:
    """What the run asks for, read once."""

    run_id: UUID
    project_id: UUID
    kind: str
    revision_id: UUID
    revision_digest: str
    params: TrainParams


@dataclass(frozen=True)
class Ready:
    """What passed the preflight: rows and the examples they were made of, and the tools these were asked with."""

    checked: Preflight
    examples: list[Example]
    bodies: dict[UUID, InteractionBody]


def train_job(lease: Lease, settings: Settings) -> None:
    """Handler of "train". Any number of attempts, killed anywhere, leave one artefact row and one hand-over."""
    run_id = UUID(lease.payload["run_id"])
    try:
        _train(lease, settings, run_id)
    except JobCancelled:
        attempt.finish(lease, run_id, "cancelled", "cancelled", None)
        attempt.remove_work(settings, run_id)
        raise
    except JobFailed as error:
        attempt.finish(lease, run_id, "failed", "failed", str(error))
        attempt.remove_work(settings, run_id)
        raise


def _train(lease: Lease, settings: Settings, run_id: UUID) -> None:
    order = _begin(lease, run_id)
    if order is None:
        return
    attempt.sweep_finished(lease, settings)
    model, tokenizer = _base_model(settings, order.params)
    base = base_digest(model)
    ready = _preflight(lease, order, tokenizer, base)
    _stop_if_cancelled(lease)
    failpoints.reach("train.checked")
    work = settings.home / "runs" / str(run_id) / str(lease.fence)
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    spec = _resumed(_spec(settings, order, model, base, work, ready), work)
    attempt.run_trainer(lease, run_id, spec, work)
    failpoints.reach("train.trained")
    built = artifact.describe(
        work / "adapter",
        base=base,
        project=order.project_id,
        run=run_id,
        revision=order.revision_digest,
        params=order.params.model_dump(mode="json"),
        kind=order.kind,
        swept=checkpoints.decided(work),
    )
    artifact.publish(work / "adapter", built, settings.artifacts)
    failpoints.reach("train.renamed")
    _hand_over(lease, order, built)
    failpoints.reach("train.committed")
    attempt.remove_work(settings, run_id)
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
        params = adapter_params(run.kind, run.params)
        return Order(run_id, run.project_id, run.kind, revision.id, revision.digest, params)


def _base_model(settings: Settings, params: TrainParams) -> tuple[Path, Tokenizer]:
    """Directory and tokenizer of the model that serves. Raises JobFailed for what no attempt can mend."""
    if params.rank > settings.adapter_rank:
        raise JobFailed(f"rank {params.rank} does not fit the engine's slots of rank {settings.adapter_rank}")
    try:
        require_quantizer(params.quantize)
        model = settings.model_path
        return model, Tokenizer.load(model)
    except (ValueError, Refused) as error:
        raise JobFailed(str(error)) from error


def _preflight(lease: Lease, order: Order, tokenizer: Tokenizer, base: str) -> Ready:
    """The checks and the examples they were made on; the report is on the run before any compute.

    Raises JobFailed when they refuse.
    """
    with lease.transaction() as session:
        ours, held_out = _examples(session, order, "train"), _examples(session, order, "held_out")
        replayed, told = draw(session, runs.get(session, order.run_id), order.params, sum_usable(order.kind, ours))
        train = [*ours, *replayed]
        bodies = _bodies(session, [*train, *held_out])
        served = _served(session, order, tokenizer, base)
        judged_by = of_examples(session, session.get_one(Project, order.project_id), held_out)
    ready = check(tokenizer, train, held_out, bodies, order.params.max_length, order.kind, served)
    report = ready.report | {"replay": told, "warnings": [warning(judged_by)] if judged_by.short else []}
    with lease.transaction() as session:
        runs.get(session, order.run_id).preflight = report
        runs.add_event(session, order.run_id, "preflight", report)
    if ready.reasons:
        raise JobFailed(f"preflight refused the run: {'; '.join(ready.reasons)}")
    return Ready(ready, train, bodies)


def _served(session: Session, order: Order, tokenizer: Tokenizer, base: str) -> Rendering | None:
    """What renders prompts now, by the newest one served since these files lie here and the engines run."""
    engines = engine_reports.unchanged_since(session, order.project_id, datetime.now(UTC))
    if engines is None:  # Nobody says what runs now; the evaluation, which takes an engine, compares files.
        return None
    since = max(rendering_since(tokenizer.directory), engines)
    return traffic.newest_rendering(session, order.project_id, base=base, since=since)


def _examples(session: Session, order: Order, split: str) -> list[Example]:
    return [member.example for member in revisions.members(session, order.revision_id, split)]


def _bodies(session: Session, examples: Sequence[Example]) -> dict[UUID, InteractionBody]:
    ids = [example.interaction_id for example in examples if example.interaction_id]
    return {body.id: body for body in session.scalars(select(InteractionBody).where(among(InteractionBody.id, ids)))}


def _spec(settings: Settings, order: Order, model: Path, base: str, work: Path, ready: Ready) -> Spec:
    params = order.params
    groups = {str(example.id): example.group_key for example in ready.examples}
    trained, held_back = parted(ready.checked.rows, groups, params)
    write_lines(work / "rows.jsonl", arranged(trained, params.seed, params.batch_size))
    write_lines(work / "validation.jsonl", [row.validation() for row in held_back])
    told = params.model_dump(mode="json", exclude={"max_length", "replay", "replay_from", "validation"})
    return Spec(
        model=str(model),
        base=base,
        rows_file=str(work / "rows.jsonl"),
        validation_file=str(work / "validation.jsonl") if held_back else "",
        out=str(work / "adapter"),
        parent=os.getpid(),
        device=settings.device,
        kind=order.kind,
        reference=_reference(ready),
        **told,
    )


def _reference(ready: Ready) -> list[ReferenceRow]:
    """Prompts for transformers to render too. A call that was forced opens the answer: no template writes that."""
    prompts = {row.example_id: row.prompt for row in ready.checked.rows}
    asked = [(one, asked_of(one, ready.bodies)) for one in ready.examples if str(one.id) in prompts]
    plain = [(one, said) for one, said in asked if not said.forced]
    return [
        ReferenceRow(one.messages, prompts[str(one.id)], list(said.tools), said.at)
        for one, said in plain[:REFERENCE_ROWS]
    ]


def _resumed(spec: Spec, work: Path) -> Spec:
    """With what checkpoints of this training bear, and the newest whole one that an earlier attempt left."""
    known = msgspec.structs.replace(spec, fingerprint=checkpoints.fingerprint(spec))
    found = checkpoints.adopt(work.parent, work, known.fingerprint)
    if found is None:
        return known
    log.info("going on from a checkpoint", step=found.step)
    return msgspec.structs.replace(known, resume=str(found.path))


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
