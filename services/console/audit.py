"""The audit log: who did what, whether the chain of hashes holds, and an export to check it elsewhere."""

import json
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Annotated, NamedTuple, cast
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response

from services.app import Streamed
from services.console.access import Administrator, Here, Lead
from services.console.memo import Memo
from services.console.views import fragment, page
from services.store import audit, audit_view
from services.store.audit_view import Search
from services.store.base import Sessions
from services.store.models import Project

router = APIRouter()
PAGE = 50
Text = Annotated[str, Query(max_length=200)]


class Checked(NamedTuple):
    """What a walk of the chain found, and when."""

    verdict: audit.Verdict
    at: datetime


class Filters(NamedTuple):
    """The filters of the page, as they stand in its address."""

    who: str
    action: str
    about: str
    window: str

    def on(self, project: Project | None) -> Search:
        return Search.asked(**self._asdict(), project=project)


def filters(who: Text = "", action: Text = "", about: Text = "", window: Text = "all") -> Filters:
    return Filters(who, action, about, window)


Asked = Annotated[Filters, Depends(filters)]
Before = Annotated[int | None, Query(ge=0, lt=2**63)]


@router.get("/audit")
def audit_page(request: Request, here: Administrator, asked: Asked, before: Before = None) -> Response:
    """Newest first; every filter is in the URL."""
    return _page(request, here, asked.on(None), before)


@router.get("/p/{slug}/audit")
def project_audit(request: Request, here: Lead, asked: Asked, before: Before = None) -> Response:
    """What happened on one project, for those who lead it."""
    return _page(request, here, asked.on(here.project), before)


def _page(request: Request, here: Here, search: Search, before: int | None) -> Response:
    lines = audit_view.lines(here.session, search, before=before, limit=PAGE + 1)
    older = urlencode(search.chosen | {"before": str(lines[PAGE - 1].event.id)}) if len(lines) > PAGE else None
    context = {
        "base": f"/p/{here.project.slug}/audit" if search.project else "/audit",
        "lines": lines[:PAGE], "search": search, "filtered": bool(search.chosen), "older": older,
        "newest": urlencode(search.chosen), "paged": before is not None,
        "actions": audit_view.actions(here.session, search.project),
    }  # fmt: skip
    return page(request, here, "audit.html", context)


@router.get("/audit/verdict")
def verdict(request: Request, here: Administrator) -> Response:
    """Whether the chain holds. The whole of it is walked, so the answer is kept for half a minute."""
    memo: Memo[Checked] = request.app.state.verdicts
    checked = memo.get("chain", lambda: Checked(audit.verify(here.session), datetime.now(UTC)))
    return fragment("audit_verdict.html", {"verdict": checked.verdict, "at": checked.at})


@router.get("/audit/export")
def export(request: Request, here: Administrator, asked: Asked) -> Response:
    """What the filters leave, oldest first, one JSON object a line."""
    audit.record(here.session, here.actor, "audit.export", "audit")
    return _file(request, asked.on(None), "audit")


@router.get("/p/{slug}/audit/export")
def export_project(request: Request, here: Lead, asked: Asked) -> Response:
    """The same of one project. Its rows alone are no chain: whether they are whole, the log of everything says."""
    audit.record(here.session, here.actor, "audit.export", f"project:{here.project.id}")
    return _file(request, asked.on(here.project), f"{here.project.slug}-audit")


def _file(request: Request, search: Search, name: str) -> Response:
    sessions = cast(Sessions, request.app.state.sessions)

    def lines() -> Generator[str]:
        with sessions() as session:  # the request's own transaction is over when the stream begins
            for row in audit_view.export(session, search):
                yield json.dumps(row, ensure_ascii=False) + "\n"

    headers = {"content-disposition": f'attachment; filename="{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"'}
    return Streamed(lines(), "application/jsonl", headers)
