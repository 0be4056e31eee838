"""The queue's page: what waits and why, who works on it, and how many labels the next decision still needs."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from sqlalchemy.orm import Session

from services.console import charts
from services.console.access import Here, Lead, Viewer
from services.console.memo import Memo
from services.console.quality_view import labels_in_words, measured
from services.console.views import fragment, page, wants_page
from services.errors import InvalidRequest
from services.store import agreement, audit, gold, projects, queues
from services.store.quality import Counted
from services.store.sampling import LEAST_AUDIT, PRECEDENCE, Plan

router = APIRouter()
Percent = Annotated[float, Form(ge=0, le=100)]


class Agreement(NamedTuple):
    """Krippendorff's α over answers that two people judged, with its 95 % interval."""

    alpha: float
    low: float
    high: float
    items: int


class Accuracy(NamedTuple):
    """Somebody's answers to hidden gold items: the share that was right, with its interval, of so many."""

    share: float
    low: float
    high: float
    answered: int


class Mix(NamedTuple):
    """The form's fields, as typed."""

    shares: dict[str, float]
    second: float
    budget: int


class Figures(NamedTuple):
    """What costs queries, kept for a moment."""

    waiting: queues.Waiting
    shares: list[queues.Share]
    flow: list[queues.Day]
    overlap: queues.Overlap
    reviewers: list[queues.Reviewer]
    decision: queues.Decision
    agreement: Agreement | None
    accuracy: Mapping[UUID, Accuracy]


@router.get("/p/{slug}/queue")
def queue(request: Request, here: Viewer) -> Response:
    """The whole page."""
    return page(request, here, "queue.html", _context(request, here))


@router.get("/p/{slug}/queue/live")
def queue_live(request: Request, here: Viewer) -> Response:
    """The figures again, for the page to swap in."""
    return fragment("queue_live.html", {"project": here.project, **_context(request, here)})


@router.post("/p/{slug}/queue/mix")
def change_mix(
    request: Request, here: Lead,
    negative_feedback: Percent = 0, schema_failure: Percent = 0, disagreement: Percent = 0,
    low_confidence: Percent = 0, novelty: Percent = 0, uniform: Percent = 0,
    second: Percent = 0, budget: Annotated[int, Form(ge=1, le=100_000)] = 200,
) -> Response:  # fmt: skip
    """Set the strategies' shares, for windows that close from now on; 400 for shares that blind the audit."""
    shares = dict(zip(PRECEDENCE, (negative_feedback, schema_failure, disagreement, low_confidence, novelty, uniform),
                      strict=True))  # fmt: skip
    typed = Mix(shares, second, budget)
    changes = {
        "strategy_mix": {name: share / 100 for name, share in shares.items()}, "second_share": second / 100,
        "review_budget": budget,
    }  # fmt: skip
    try:
        projects.configure(here.session, here.project, changes)
    except InvalidRequest as error:
        if not wants_page(request):
            raise
        return page(request, here, "queue.html", _context(request, here, typed, error.message), status=error.status)
    subject = f"project:{here.project.id}"
    audit.record(here.session, here.user.email, "project.configure", subject, {"config": changes})
    if wants_page(request):
        return RedirectResponse(f"/p/{here.project.slug}/queue", status_code=303)
    return JSONResponse({"config": here.project.config})


def _context(request: Request, here: Here, typed: Mix | None = None, refused: str = "") -> dict[str, Any]:
    now = datetime.now(UTC)
    memo: Memo[Figures] = request.app.state.queue_figures
    quality = measured(request, here)
    plan, wrong = _plan(here)
    key = (here.project.id, tuple(plan.mix.items()))
    figures = memo.get(key, lambda: _figures(here, now, plan, quality.found))
    shares = {name: round(100 * share, 1) for name, share in plan.mix.items()}
    return {
        "figures": figures,
        "plot": _plot(figures.flow, now),
        "trend": _trend(figures.flow),
        "mix": typed or Mix(shares, round(100 * (plan.second_share or 0), 1), plan.budget),
        "refused": refused,
        "wrong": wrong,
        "least_audit": LEAST_AUDIT,
        "labels_in_words": labels_in_words(quality.quality.recent),
        "may_lead": here.may("lead"),
        "may_review": here.may("reviewer"),
    }


def _plan(here: Here) -> tuple[Plan, str]:
    """The project's plan, or the default beside what is wrong with the stored one: the page is where it is mended."""
    try:
        return Plan.of(here.project.config), ""
    except ValueError as error:
        return Plan.of({}), str(error)


def _figures(here: Here, now: datetime, plan: Plan, found: Sequence[Counted]) -> Figures:
    session, project = here.session, here.project
    waiting = queues.waiting(session, project.id)
    return Figures(
        waiting=waiting,
        shares=queues.mix(plan.mix, found, waiting),
        flow=queues.flow(session, project.id, now),
        overlap=queues.overlap(session, project.id, plan.held_out_share),
        reviewers=queues.reviewers(session, project.id, now),
        decision=queues.next_decision(session, project),
        agreement=agreement_of(session, project.id),
        accuracy=accuracy_of(session, project.id),
    )


def _plot(days: Sequence[queues.Day], now: datetime) -> charts.Bands | None:
    if not any(day.came or day.left for day in days):
        return None
    series = [
        [_reading(now - timedelta(days=day.ago + 0.5), getattr(day, name)) for day in days] for name in ("came", "left")
    ]
    since = now - timedelta(days=queues.FLOW_DAYS)
    return charts.bands(series, since.timestamp(), now.timestamp(), width=560, height=200)


def _reading(at: datetime, value: int) -> charts.Reading:
    return charts.Reading(at.timestamp(), value, value, value, value)


def _trend(days: Sequence[queues.Day]) -> str:
    """What the plot says, in a sentence."""
    came, left = sum(day.came for day in days[-7:]), sum(day.left for day in days[-7:])
    said = f"In the last seven days {came:,} came and {left:,} were reviewed"
    if not came and not left:  # older ones may still be on the plot
        return "Nothing came and nothing was reviewed in the last seven days."
    if left >= came:
        return f"{said}: the queue is not growing."
    return f"{said}. What is not reached stays; the estimate needs some labels of every stratum, not all of them."


# --- figures of other parts -------------------------------------------------------------------------------


def agreement_of(session: Session, project_id: UUID) -> Agreement | None:
    """How far reviewers agree; None while too few answers have two judgements."""
    found = agreement.alpha(session, project_id)
    if found is None:
        return None
    return Agreement(found.value, found.low, found.high, found.items)


def accuracy_of(session: Session, project_id: UUID) -> Mapping[UUID, Accuracy]:
    """How often each reviewer is right on items whose answer is known."""
    found = gold.accuracy(session, project_id)
    return {one.user_id: Accuracy(one.share, one.low, one.high, one.answered) for one in found}
