"""Erasing an end user or a session: a preview, a confirmation, how far it is, the certificate to keep."""

import json
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from services.console.access import Admin, Here
from services.console.views import fragment, page
from services.errors import NotFound, Unprocessable
from services.store import audit_view, erasure, erasure_rows
from services.store.certificate import CANNOT_BE_UNDONE
from services.store.erasure import LONGEST_SUBJECT
from services.store.models import ErasureRequest

router = APIRouter()
# In the order in which they concern somebody; bodies are told by their interactions.
TOLD = {
    "interaction": "Answers", "feedback": "Feedback", "annotation": "Judgements", "review_item": "Review items",
    "example": "Examples", "pin": "Pinned answers", "example_embedding": "Worked examples",
    "interaction_embedding": "Search vectors", "evaluation_row": "Rows of evaluations",
    "bulk_change": "Changes by bulk actions", "interaction_body": "Texts of answers",
}  # fmt: skip
Kind = Annotated[Literal["end_user", "session"], Form()]
Name = Annotated[str, Form(min_length=1, max_length=LONGEST_SUBJECT)]


@router.get("/p/{slug}/erasure")
def erasure_page(request: Request, here: Admin) -> Response:
    """The form, and every erasure that concerned this project."""
    return page(request, here, "erasure.html", _listed(here) | {"asked": None})


@router.get("/p/{slug}/erasure/live")
def erasure_live(here: Admin) -> Response:
    """The list again, for the page to swap in."""
    return fragment("erasure_live.html", {"project": here.project, **_listed(here)})


def _listed(here: Here) -> dict[str, Any]:
    found = erasure.list_(here.session, here.project.id)
    asking = audit_view.names(here.session, [one.asked_by for one in found])
    return {"erasures": found, "asking": asking, "cannot": CANNOT_BE_UNDONE}


@router.post("/p/{slug}/erasure/preview")
def preview(request: Request, here: Admin, kind: Kind, subject: Name) -> Response:
    """What it would touch; nothing has happened yet."""
    found = erasure.checked(here.project.id, kind, subject.strip())
    touched = erasure_rows.preview(here.session, found)
    rows = {words: touched[table] for table, words in TOLD.items() if touched.get(table)}
    rows |= {table.replace("_", " "): count for table, count in touched.items() if count and table not in TOLD}
    asked = {"kind": kind, "subject": found.name, "rows": rows}
    return page(request, here, "erasure.html", _listed(here) | {"asked": asked})


@router.post("/p/{slug}/erasure")
def erase(
    here: Admin, kind: Kind, subject: Name, confirmed: Annotated[str, Form(max_length=LONGEST_SUBJECT)]
) -> Response:
    """Begin, once the name has been typed a second time."""
    found = erasure.checked(here.project.id, kind, subject)
    if confirmed.strip() != found.name:
        raise Unprocessable("the name typed to confirm is not the one to erase; nothing was erased", param="confirmed")
    erasure.request(here.session, found, here.actor)
    return _back(here)


@router.post("/p/{slug}/erasure/{request_id}/again")
def again(here: Admin, request_id: UUID) -> Response:
    """Go on with one that failed."""
    erasure.again(here.session, erasure.get(here.session, request_id, here.project.id))
    return _back(here)


@router.get("/p/{slug}/erasure/{request_id}/certificate")
def certificate(here: Admin, request_id: UUID) -> Response:
    """The certificate as a file."""
    made: ErasureRequest = erasure.get(here.session, request_id)
    if made.project_id not in (None, here.project.id) or made.certificate is None:
        raise NotFound(f"there is no certificate of an erasure {request_id} here")
    body = json.dumps(made.certificate, indent=2, sort_keys=True) + "\n"
    headers = {"content-disposition": f'attachment; filename="erasure-{made.id}.json"'}
    return Response(body, media_type="application/json", headers=headers)


def _back(here: Here) -> Response:
    return RedirectResponse(f"/p/{here.project.slug}/erasure", status_code=303)
