"""The admin API's part on evaluations: what the gate decided, row figures, and a person's override."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query

from services.admin import shapes
from services.admin.access import Trainer
from services.errors import Conflict, NotFound
from services.store import audit, evaluations
from services.store.models import Run

router = APIRouter(prefix="/api")


@router.get("/p/{slug}/evaluations")
def list_evaluations(caller: Trainer, slug: str, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> dict[str, Any]:
    """Decided ones, newest first."""
    found = evaluations.list_(caller.session, caller.project(slug).id, limit=limit)
    return {"evaluations": [shapes.evaluation(one) for one in found]}


@router.post("/runs/{run_id}/override")
def override(caller: Trainer, run_id: UUID, sent: shapes.Override) -> dict[str, Any]:
    """Let the run's refused candidate through; 400 without a reason, 409 when there is no refusal to override."""
    run = caller.session.get(Run, run_id)
    if run is None or caller.key.project_id not in (None, run.project_id):
        raise NotFound(f"there is no run {run_id}")
    evaluation = evaluations.of_run(caller.session, run.id)
    if evaluation is None:
        raise Conflict("the gate has decided nothing about this run")
    evaluations.override(caller.session, evaluation, actor=caller.actor, reason=sent.reason.replace("\x00", ""))
    detail = {"run": str(run.id), "candidate": evaluation.candidate_digest, "reason": evaluation.override_reason}
    audit.record(caller.session, caller.actor, "evaluation.override", f"evaluation:{evaluation.id}", detail)
    return shapes.run(run)
