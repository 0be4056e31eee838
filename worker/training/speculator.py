"""A speculator run's "train.speculator" job: the log's requests, the trainer process, the artefact, on to the gate."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import structlog

from engine.digest import base_digest
from engine.models.registry import read_spec
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import deployments, failpoints, runs, traffic
from services.store.base import uuid7_time
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.run_params import SpeculatorParams
from services.store.traffic import Answer, Size
from worker.training import artifact, attempt
from worker.training.choosing import choose, costs
from worker.training.spec import REPORT, HeadsSpec, Request

# Survives attempts, so that the next one goes on where a killed trainer was.
CHECKPOINT = "checkpoint"

log = structlog.get_logger()


@dataclass(frozen=True)
class Order:
    """What the run asks for, and what serves and drafts now, read once."""

    run_id: UUID
    project_id: UUID
    params: SpeculatorParams
    adapter: str | None
    champion: str | None


@dataclass(frozen=True)
class Window:
    """What of the log was read."""

    first: datetime
    last: datetime
    requests: int


class TooLittle(Exception):
    """The log does not hold enough yet: the run is refused, in these words, and is no failure."""


def speculator_job(lease: Lease, settings: Settings) -> None:
    """Handler of "train.speculator". Any number of attempts leave one artefact row and one hand-over."""
    run_id = UUID(lease.payload["run_id"])
    try:
        _train(lease, settings, run_id)
    except TooLittle as error:
        attempt.finish(lease, run_id, "succeeded", "refused", str(error))
        attempt.remove_work(settings, run_id)
    except JobCancelled:
        attempt.finish(lease, run_id, "cancelled", "cancelled", None)
        attempt.remove_work(settings, run_id)
        raise
    except JobFailed as error:
        attempt.finish(lease, run_id, "failed", "failed", str(error))
        attempt.remove_work(settings, run_id)
        raise


def _require_room(settings: Settings, params: SpeculatorParams, tokens: int) -> None:
    """Heads that an engine of a model with `tokens` would refuse need not be trained. Raises JobFailed."""
    if not settings.speculation:
        raise JobFailed("WHET_SPECULATION is off: the engine drafts nothing")
    if params.heads > settings.speculator_heads:
        raise JobFailed(f"{params.heads} heads do not fit the engine's slots of {settings.speculator_heads}")
    words = min(params.vocabulary, tokens)
    if words > settings.speculator_vocabulary:
        raise JobFailed(
            f"{words} words do not fit the engine's slots of {settings.speculator_vocabulary}: "
            "ask for a smaller vocabulary, or raise WHET_SPECULATOR_VOCABULARY"
        )


def _train(lease: Lease, settings: Settings, run_id: UUID) -> None:
    order = _begin(lease, run_id)
    if order is None:
        return
    attempt.sweep(lease, settings, keep=CHECKPOINT)
    try:
        model = settings.model_path
        tokenizer = Tokenizer.load(model)
    except ValueError as error:
        raise JobFailed(str(error)) from error
    _require_room(settings, order.params, read_spec(model).vocab_size)
    base = base_digest(model)
    work = settings.home / "runs" / str(run_id) / str(lease.fence)
    work.mkdir(parents=True, exist_ok=True)
    window = _write_rows(lease, order, tokenizer, base, work / "rows.jsonl")
    if lease.cancelled():
        raise JobCancelled
    failpoints.reach("speculator.read")
    attempt.run_trainer(lease, run_id, _spec(settings, order, model, work), work)
    failpoints.reach("speculator.trained")
    report = json.loads((work / "heads" / REPORT).read_text(encoding="utf-8"))
    (work / "heads" / REPORT).unlink()
    built = artifact.describe_speculator(
        work / "heads",
        base=base,
        vocabulary=tokenizer.digest,
        adapter=order.adapter,
        report=report,
        params=order.params.model_dump(mode="json"),
        project=order.project_id,
        run=run_id,
        window={"first": window.first.isoformat(), "last": window.last.isoformat()},
    )
    artifact.publish(work / "heads", built, settings.artifacts)
    failpoints.reach("speculator.renamed")
    _hand_over(lease, order, built, report)
    failpoints.reach("speculator.committed")
    attempt.remove_work(settings, run_id)
    log.info("heads built", digest=built.digest, **report["tau"])


def _begin(lease: Lease, run_id: UUID) -> Order | None:
    """None when the run is over."""
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        if run.state not in runs.UNFINISHED:
            return None
        runs.enter_phase(session, run, "reading")
        deployment = deployments.create(session, run.project_id)
        params = SpeculatorParams.model_validate(run.params)
        return Order(run_id, run.project_id, params, deployment.active_digest, deployment.speculator_digest)


def _write_rows(lease: Lease, order: Order, tokenizer: Tokenizer, base: str, file: Path) -> Window:
    """The chosen requests into `file`, oldest first. Raises TooLittle."""
    with lease.sessions() as session:
        known = traffic.sizes(
            session, order.project_id, tokenizer=tokenizer.digest, template=tokenizer.template_digest, base=base
        )
        least = order.params.min_requests
        if len(known) < least:
            raise TooLittle(
                f"{len(known)} live requests can be learned from (complete, of this model, tokenizer and template); "
                f"heads need {least}"
            )
        chosen = choose_rows(known, order.adapter, order.params.max_tokens, order.params.seed)
        written = 0
        with file.open("wb") as out:
            for answer in traffic.answers(session, order.project_id, [row.id for row in chosen]):
                if (request := as_request(answer)) is not None:
                    out.write(msgspec.json.encode(request) + b"\n")
                    written += 1
    if written < min(least, len(chosen)) or not written:
        raise TooLittle(f"only {written} of the log's requests hold the token ids to learn from; heads need {least}")
    moments = [uuid7_time(row.id) for row in chosen]
    window = Window(min(moments), max(moments), written)
    with lease.transaction() as session:
        note = {"requests": written, "logged": len(known), "of_this_adapter": _own(chosen, order.adapter)}
        runs.add_event(session, order.run_id, "log", {"line": f"read {written} requests", **note})
    return window


def _own(rows: Sequence[Size], adapter: str | None) -> int:
    return sum(row.adapter == adapter for row in rows)


def choose_rows(known: Sequence[Size], adapter: str | None, budget: int, seed: int) -> list[Size]:
    """What the adapter being served has said comes first, half newest, half drawn; earlier weights' answers fill up.

    In the result its answers stand last, as the newest: heads are stopped and judged by what is served now.
    """
    own = [row for row in known if row.adapter == adapter]
    cost = dict(zip(known, costs([row.tokens for row in known], budget), strict=True))
    chosen = [own[index] for index in choose([cost[row] for row in own], budget, seed)]
    if len(chosen) < len(own):
        return chosen
    left = budget - sum(cost[row] for row in chosen)
    others: list[Size] = []
    for row in reversed([row for row in known if row.adapter != adapter]):
        if cost[row] > left:
            break
        others.append(row)
        left -= cost[row]
    return [*reversed(others), *chosen]


def as_request(answer: Answer) -> Request | None:
    """None for a row that holds no token ids."""
    if not answer.prompt or len(answer.answer) < 2:
        return None
    parameters = answer.parameters
    return Request(
        prompt=answer.prompt,
        answer=answer.answer,
        temperature=float(parameters.get("temperature", 0.0)),
        seed=int(parameters.get("seed", 0)),
        group=answer.group,
    )


def _spec(settings: Settings, order: Order, model: Path, work: Path) -> HeadsSpec:
    def published(digest: str | None) -> str:
        return str(settings.artifacts / digest) if digest else ""

    return HeadsSpec(
        model=str(model),
        rows_file=str(work / "rows.jsonl"),
        out=str(work / "heads"),
        checkpoint=str(work.parent / CHECKPOINT),
        adapter=published(order.adapter),
        champion=published(order.champion),
        parent=os.getpid(),
        device=settings.device,
        precision=settings.precision,
        adapter_rank=settings.adapter_rank,
        **order.params.model_dump(mode="json", exclude={"min_requests"}),
    )


def _hand_over(lease: Lease, order: Order, built: artifact.Built, report: dict[str, Any]) -> None:
    with lease.transaction() as session:
        run = runs.get(session, order.run_id)
        artifact.record(session, built, project_id=order.project_id, run_id=order.run_id)
        run.artifact_digest = built.digest
        runs.enter_phase(session, run, "judging")
        # Whoever drafted when the training began is who the candidate was compared with.
        runs.add_event(session, order.run_id, "held_out", {**report, "incumbent": order.champion})
        runs.hand_over(session, run, "evaluate.speculator", {"run_id": str(run.id)})
        lease.succeed(session)
