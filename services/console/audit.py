"""The audit log: who did what, whether the chain of hashes holds, and an export to check it elsewhere."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, NamedTuple, cast
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from services.console.access import Administrator
from services.console.memo import Memo
from services.console.views import fragment, page
from services.store import audit, audit_view
from services.store.base import Sessions

router = APIRouter()
PAGE = 50
Text = Annotated[str, Query(max_length=200)]


class Checked(NamedTuple):
    """What a walk of the chain found, and when."""

    verdict: audit.Verdict
    at: datetime


def _search(who: str, action: str, about: str, window: str) -> audit_view.Search:
    return audit_view.Search(
        who=who.strip().replace("\x00", ""),
        action=action.replace("\x00", ""),
        about=about.strip().replace("\x00", ""),
        window=window if window in audit_view.WINDOWS else "all",
    )


@router.get("/audit")
def audit_page(
    request: Request, here: Administrator, who: Text = "", action: Text = "", about: Text = "", window: Text = "all",
    before: int | None = None,
) -> Response:  # fmt: skip
    """Newest first; every filter is in the URL."""
    search = _search(who, action, about, window)
    lines = audit_view.lines(here.session, search, before=before, limit=PAGE + 1)
    chosen = {"who": search.who, "action": search.action, "about": search.about, "window": search.window}
    kept = {name: value for name, value in chosen.items() if value and (name, value) != ("window", "all")}
    older = urlencode(kept | {"before": str(lines[PAGE - 1].event.id)}) if len(lines) > PAGE else None
    context = {
        "lines": lines[:PAGE], "search": search, "filtered": bool(kept), "older": older, "newest": urlencode(kept),
        "paged": before is not None, "actions": audit_view.actions(here.session),
    }  # fmt: skip
    return page(request, here, "audit.html", context)


@router.get("/audit/verdict")
def verdict(request: Request, here: Administrator) -> Response:
    """Whether the chain holds. The whole of it is walked, so the answer is kept for half a minute."""
    memo: Memo[Checked] = request.app.state.verdicts
    checked = memo.get("chain", lambda: Checked(audit.verify(here.session), datetime.now(UTC)))
    return fragment("audit_verdict.html", {"verdict": checked.verdict, "at": checked.at})


@router.get("/audit/export")
def export(
    request: Request, here: Administrator, who: Text = "", action: Text = "", about: Text = "", window: Text = "all"
) -> Response:
    """What the filters leave, oldest first, one JSON object a line."""
    audit.record(here.session, here.actor, "audit.export", "audit")
    search = _search(who, action, about, window)
    sessions = cast(Sessions, request.app.state.sessions)

    def lines() -> Iterator[str]:
        with sessions() as session:  # the request's own transaction is over when the stream begins
            for row in audit_view.export(session, search):
                yield json.dumps(row, ensure_ascii=False) + "\n"

    name = f"audit-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.jsonl"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(lines(), media_type="application/jsonl", headers=headers)
