"""How a project wants to be reviewed: guidelines, tags, blindness and hidden checks, edited by its leads."""

from hashlib import sha256
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.console.access import Here, Lead
from services.console.views import page
from services.errors import Conflict, InvalidRequest
from services.store import audit, gold, interactions, projects, reviews
from services.store.models import Project, ReviewItem

router = APIRouter()
MOST_TAGS, LONGEST_TAG = 40, 60
MOST_SHOWN = 200


@router.get("/p/{slug}/review/guide")
def guide(request: Request, here: Lead, saved: bool = False) -> Response:
    """What reviewers read and choose from, which items check them, and how they did."""
    context = {
        "guidelines": here.project.config.get("guidelines", ""),
        "tags": here.project.config.get("tags", []),
        "blind": here.project.config.get("blind_review", True),
        "gold_percent": round(100 * gold.share(here.project), 1),
        "seen": _state(here.project),
        "gold": _gold(here.session, here.project),
        "accuracy": gold.accuracy(here.session, here.project.id),
        "saved": saved,
    }
    return page(request, here, "review_guide.html", context)


def _gold(session: Session, project: Project) -> list[dict[str, Any]]:
    marked = (
        select(ReviewItem)
        .where(ReviewItem.project_id == project.id, ReviewItem.gold.is_not(None))
        .order_by(ReviewItem.done_at.desc())
        .limit(MOST_SHOWN)
    )
    items = list(session.scalars(marked))
    logged = interactions.get_many(session, [item.interaction_id for item in items])
    bodies = {one: record.body for one, record in logged.items()}
    return [{"item": item, "body": bodies.get(item.interaction_id)} for item in items]


@router.post("/p/{slug}/review/guide")
def save(
    here: Lead,
    seen: Annotated[str, Form()],
    guidelines: Annotated[str, Form(max_length=20_000)] = "",
    tags: Annotated[str, Form(max_length=4_000)] = "",
    gold_percent: Annotated[float, Form(ge=0, le=50)] = 5.0,
    blind: Annotated[bool, Form()] = False,
) -> Response:
    """Store them all, unless somebody else changed one since the form was opened."""
    here.session.refresh(here.project, with_for_update=True)
    if seen != _state(here.project):
        raise Conflict("somebody changed these while you were writing; go back, copy your text, and reload the page")
    changes = {
        "guidelines": guidelines.replace("\r\n", "\n").strip() or None,
        "tags": _tags(tags) or None,
        "blind_review": blind,
        "gold_share": gold_percent / 100,
    }
    before = {name: here.project.config.get(name) for name in changes}
    projects.configure(here.session, here.project, changes)
    _tell(here, before)
    return RedirectResponse(f"/p/{here.project.slug}/review/guide?saved=1", status_code=303)


@router.post("/p/{slug}/review/guide/gold/{item_id}/remove")
def remove_gold(here: Lead, item_id: UUID) -> Response:
    """Check nobody by the item any more."""
    gold.unmark(here.session, reviews.lock_item(here.session, here.project.id, item_id))
    subject = f"project:{here.project.id}"
    audit.record(here.session, here.user.email, "review.gold_removed", subject, {"item": str(item_id)})
    return RedirectResponse(f"/p/{here.project.slug}/review/guide", status_code=303)


def _tags(lines: str) -> list[str]:
    """One tag a line, in order, none twice."""
    found = list(dict.fromkeys(line.strip() for line in lines.splitlines() if line.strip()))
    if len(found) > MOST_TAGS or any(len(tag) > LONGEST_TAG for tag in found):
        raise InvalidRequest(f"tags are at most {MOST_TAGS}, of {LONGEST_TAG} characters each", param="tags")
    return found


def _state(project: Project) -> str:
    """A short name for what the form shows, to notice a change in between."""
    shown = [project.config.get(name) for name in ("guidelines", "tags", "blind_review", "gold_share")]
    return sha256(repr(shown).encode()).hexdigest()[:16]


def _tell(here: Here, before: dict[str, Any]) -> None:
    changed = [name for name, value in before.items() if here.project.config.get(name) != value]
    if changed:
        subject = f"project:{here.project.id}"
        audit.record(here.session, here.user.email, "review.guide", subject, {"changed": changed, "before": before})
