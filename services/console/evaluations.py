"""Evaluations: what was compared with what, what the gate decided and why, and a person's override."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from services.console.access import Here, Operator, Viewer
from services.console.evaluation_view import Chosen, describe, target_line
from services.console.views import page, wants_page
from services.errors import NotFound
from services.store import audit, evaluations
from services.store.models import Evaluation

router = APIRouter()
LISTED = 50


@router.get("/p/{slug}/evaluations")
def evaluation_list(request: Request, here: Viewer, start: Annotated[int, Query(ge=0, le=1_000_000)] = 0) -> Response:
    """Newest first, with what the gate said."""
    found = evaluations.list_(here.session, here.project.id, limit=LISTED + 1, offset=start)
    context: dict[str, Any] = {
        "listed": [(one, target_line(one.summary)) for one in found[:LISTED]],
        "start": start,
        "shown": LISTED,
        "more": len(found) > LISTED,
    }
    return page(request, here, "evaluations.html", context)


@router.get("/p/{slug}/evaluations/{evaluation_id}")
def evaluation_page(
    request: Request,
    here: Viewer,
    evaluation_id: UUID,
    outcome: Annotated[str, Query(pattern="^(win|tie|loss)?$")] = "",
    slice_: Annotated[str, Query(alias="slice", max_length=100)] = "",
    start: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
) -> Response:
    """One comparison, from its figures to its rows."""
    chosen = Chosen(outcome, slice_.replace("\x00", ""), start)
    return page(request, here, "evaluation.html", describe(here.session, _found(here, evaluation_id), chosen))


@router.post("/p/{slug}/evaluations/{evaluation_id}/override")
def override(
    request: Request, here: Operator, evaluation_id: UUID, reason: Annotated[str, Form(max_length=2000)] = ""
) -> Response:
    """Let a refused candidate through, with a reason; 409 when there is nothing to override."""
    evaluation = _found(here, evaluation_id)
    run = evaluations.override(here.session, evaluation, actor=here.user.email, reason=reason.replace("\x00", ""))
    detail = {"project": here.project.slug, "candidate": evaluation.candidate_digest, "reason": reason}
    audit.record(here.session, here.user.email, "evaluation.override", f"evaluation:{evaluation.id}", detail)
    if wants_page(request):
        return RedirectResponse(f"/p/{here.project.slug}/evaluations/{evaluation.id}", status_code=303)
    return JSONResponse({"run": str(run.id), "phase": run.phase})


def _found(here: Here, evaluation_id: UUID) -> Evaluation:
    evaluation = here.session.get(Evaluation, evaluation_id)
    if evaluation is None or evaluation.project_id != here.project.id or evaluation.decision == "undecided":
        raise NotFound("there is no such evaluation in this project")
    return evaluation
