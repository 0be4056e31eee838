"""Templates to answers: Jinja2 with escaping always on and undefined names an error."""

from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from services.console import charts, worddiff, wording
from services.console.access import Here
from services.errors import WhetError
from services.store import pages, people

WEB = Path(__file__).resolve().parents[2] / "web"


@cache
def environment() -> Environment:
    """The one template environment of the process."""
    made = Environment(
        loader=FileSystemLoader(WEB / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters.update(wording.FILTERS)
    made.globals.update(
        review_modules=sorted(one.name for one in (WEB / "static" / "review").glob("*.js") if "worker" not in one.name),
        spark=charts.spark,
        line_chart=charts.line_chart,
        forest=charts.forest,
        diff=worddiff.diff,
        took=wording.took,
    )
    return made


def page(
    request: Request, here: Here, template: str, context: dict[str, Any] | None = None, *, status: int = 200
) -> HTMLResponse:
    """A whole page in its frame: navigation, switcher, badges."""
    user = here.user_or_none
    frame = {
        "path": request.url.path,
        "user": user,
        "project": here.project_or_none,
        "role": here.role,
        "may": {name: here.may(name) for name in ("viewer", "reviewer", "lead", "operator", "admin")},
        "switcher": people.projects_of(here.session, user.id) if user else [],
        "waiting_badge": pages.waiting(here.session, here.project.id) if here.project_or_none else 0,
    }
    return HTMLResponse(environment().get_template(template).render(frame | (context or {})), status_code=status)


def fragment(template: str, context: dict[str, Any]) -> HTMLResponse:
    """A part of a page, for live updates."""
    return HTMLResponse(environment().get_template(template).render(context))


def wants_page(request: Request) -> bool:
    """Whether a person's browser asks, rather than a script."""
    return "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")


def error_page(error: WhetError) -> Response:
    """An expected failure as a page; it touches no database, which may be what failed."""
    frame = {"status": error.status, "message": error.message}
    return HTMLResponse(environment().get_template("error.html").render(frame), status_code=error.status)
