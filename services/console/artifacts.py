"""Lineage both ways: what came of one interaction, and what taught one artefact and where it answered."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response

from services.console import descent_drawing
from services.console.access import Here, Viewer
from services.console.artifact_drawing import draw
from services.console.browsing import still_blind
from services.console.memo import Memo
from services.console.run_view import TARGET
from services.console.views import page
from services.store import artifact_view, descent
from services.store.artifact_view import About, Answered
from services.store.models import Evaluation

router = APIRouter()
PAGE = 50
Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
ORIGINS = {"live": "live", "shadow": "in the shadow", "evaluation": "for evaluations"}


@router.get("/p/{slug}/interactions/{interaction_id}/lineage")
def interaction_lineage(request: Request, here: Viewer, interaction_id: UUID) -> Response:
    """From one answer to the weights it taught, as a drawing and as tables."""
    found = descent.trace(here.session, here.project.id, interaction_id)
    blind = still_blind(here, found.item)
    context = {
        "found": found, "blind": blind, "part": descent.part,
        "drawing": descent_drawing.draw(here.project.slug, found, blind=blind),
        "told": descent_drawing.in_words(found),
    }  # fmt: skip
    return page(request, here, "descent.html", context)


@router.get("/p/{slug}/artifacts/{digest}")
def artifact_page(
    request: Request, here: Viewer, digest: Digest, start: Annotated[int, Query(ge=0, le=10_000_000)] = 0
) -> Response:
    """What taught it, who judged it, where and how much it answered, and back to the interactions."""
    about = artifact_view.about(here.session, here.project.id, digest)
    answered = _answered(request, here, about)
    rows = artifact_view.lessons(here.session, about, limit=PAGE, offset=start)
    context: dict[str, Any] = {
        "about": about, "answered": answered, "origins": ORIGINS, "lessons": rows, "start": start, "shown": PAGE,
        "scores": {one.id: _scores(one) for one in about.evaluations},
        "drawing": draw(here.project.slug, about, answered),
    }  # fmt: skip
    return page(request, here, "artifact.html", context)


def _answered(request: Request, here: Here, about: About) -> Answered:
    memo: Memo[Answered] = request.app.state.answered
    return memo.get(about.artifact.digest, lambda: artifact_view.answered(here.session, about.artifact))


def _scores(evaluation: Evaluation) -> dict[str, Any] | None:
    """The gate's own figures on what was corrected."""
    found: dict[str, Any] | None = evaluation.summary.get("slices", {}).get(TARGET)
    return found
