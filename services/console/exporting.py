"""The log as a file, streamed while it is read; who took what is in the audit log."""

from datetime import UTC, datetime
from typing import Annotated, cast

from fastapi import APIRouter, Form, Request, Response

from services.app import Streamed
from services.console.access import Lead
from services.console.browsing import pairs, results, told
from services.store import audit, export
from services.store.base import Sessions, uuid7
from services.store.search import RANKED, parsed

router = APIRouter()
TYPES = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}


@router.post("/p/{slug}/interactions/export")
def export_interactions(
    request: Request,
    here: Lead,
    kind: Annotated[export.Format, Form(alias="format")] = "jsonl",
    query: Annotated[str, Form(max_length=20_000)] = "",
) -> Response:
    """All that a search finds, as it stands now; of a ranked search what is ranked."""
    wanted = parsed(pairs(query))
    before = uuid7()
    ids = None
    if wanted.words and wanted.mode != "words":
        got = results(request, here, wanted, limit=RANKED)
        ids = got.found.ids if got.ranked else None
    said = {"format": kind, "filters": told(wanted)}
    audit.record(here.session, here.user.email, "interactions.export", f"project:{here.project.id}", said)
    name = f"{here.project.slug}-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.{kind}"
    sessions = cast(Sessions, request.app.state.sessions)
    pages = export.pages(sessions, here.project.id, wanted, kind, ids=ids, before=before)
    return Streamed(pages, TYPES[kind], {"content-disposition": f'attachment; filename="{name}"'})
