"""Two pages of settings, each beside what it governs: how candidates reach traffic, and how the gate scores."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import RedirectResponse

from services.console import setting_form
from services.console.access import Here, Operator, Viewer
from services.console.views import page, wants_page
from services.errors import Conflict, InvalidRequest
from services.store import project_settings, trials
from services.store.models import Project
from services.store.project_settings import Part

router = APIRouter(prefix="/p/{slug}")
LONGEST = 50_000
CHANGED = (
    "Somebody changed these settings while you were writing. What you typed stands below and is not stored; store it "
    "again to replace what they chose."
)


class Told(NamedTuple):
    """A page's words: where it is linked from, what it is about, and what becomes of work under way."""

    place: str
    above: str
    title: str
    about: str
    keeps: str


PAGES: Mapping[Part, Told] = {
    "rollout": Told(
        "deployment", "Deployment", "How candidates reach traffic",
        "What becomes of a candidate that passed the gate until it serves everybody, or is taken back.",
        "A trial keeps the settings it started with: what is stored here holds from the next one on.",
    ),
    "gate": Told(
        "evaluations", "Evaluations", "How the gate scores",
        "What answers of a candidate and of what serves are scored by, and how much worse a candidate may be.",
        "An evaluation reads its settings when it begins, or begins again after an interruption; what is stored here "
        "holds from then on.",
    ),
}  # fmt: skip


async def _sent(request: Request) -> dict[str, str]:
    """The form's fields by name."""
    form = await request.form(max_files=0, max_fields=100)
    texts = {name: value for name, value in form.items() if isinstance(value, str)}
    for name, text in texts.items():
        if len(text) > LONGEST:
            raise InvalidRequest(f"{name} is longer than {LONGEST:,} characters", param=name)
    return {name: text.replace("\r\n", "\n").replace("\x00", "") for name, text in texts.items()}


Sent = Annotated[dict[str, str], Depends(_sent)]


@router.get("/deployment/settings")
def rollout_settings(request: Request, here: Viewer, saved: bool = False) -> Response:
    """How candidates reach traffic: a form for operators, facts for everybody else."""
    return _shown(request, here, "rollout", saved=saved)


@router.post("/deployment/settings")
def set_rollout(request: Request, here: Operator, sent: Sent) -> Response:
    """Store it; the next trial begins with it."""
    return _stored(request, here, "rollout", sent)


@router.get("/evaluations/settings")
def gate_settings(request: Request, here: Viewer, saved: bool = False) -> Response:
    """How the gate scores: a form for operators, facts for everybody else."""
    return _shown(request, here, "gate", saved=saved)


@router.post("/evaluations/settings")
def set_gate(request: Request, here: Operator, sent: Sent) -> Response:
    """Store it; the next evaluation scores by it."""
    return _stored(request, here, "gate", sent)


def _shown(
    request: Request, here: Here, part: Part, sent: Mapping[str, str] | None = None,
    wrong: Mapping[str, str] | None = None, *, saved: bool = False, status: int = 200,
) -> Response:  # fmt: skip
    context = {
        "told": PAGES[part],
        "sections": setting_form.sections(here.project.config, part, sent, wrong),
        "general": (wrong or {}).get(""),
        "seen": _state(here.project, part),
        "saved": saved,
        "under_way": part == "rollout" and trials.open_of(here.session, here.project.id) is not None,
    }
    return page(request, here, "settings.html", context, status=status)


def _stored(request: Request, here: Here, part: Part, sent: Mapping[str, str]) -> Response:
    """All fields at once, unless one is wrong or somebody else stored others meanwhile."""
    here.session.refresh(here.project, with_for_update=True)
    typed = setting_form.parse(part, sent)
    wrong = setting_form.wrong_with(here.project.config, part, typed)
    stale = sent.get("seen", "") not in ("", _state(here.project, part))
    if not wrong and not stale:
        project_settings.change(here.session, here.project, part, typed.values, here.user.email)
        return RedirectResponse(f"/p/{here.project.slug}/{PAGES[part].place}/settings?saved=1", status_code=303)
    if wants_page(request):
        said = {"": CHANGED, **wrong} if stale else wrong
        return _shown(request, here, part, sent, said, status=409 if stale else 422)
    if stale:
        raise Conflict("somebody else changed these settings")
    name, words = next(iter(wrong.items()))
    raise InvalidRequest(f"{name}: {words}".removeprefix(": "), param=name)


def _state(project: Project, part: Part) -> str:
    """A short name for what the form shows, to notice a change in between."""
    chosen = json.dumps(project_settings.chosen(project.config, part), sort_keys=True)
    return sha256(chosen.encode()).hexdigest()[:16]
