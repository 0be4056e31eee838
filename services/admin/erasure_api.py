"""The admin API's part on erasure: what it would touch, asking for it, how far it is, and its certificate."""

from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from services.admin import shapes
from services.admin.access import Admin, Caller
from services.store import erasure, erasure_rows, erasure_spools
from services.store.erasure import LONGEST_SUBJECT
from services.store.erasure_cover import Subject
from services.store.models import ErasureRequest, LogSpool

router = APIRouter(prefix="/api/erasures")
spool_router = APIRouter(prefix="/api/spools")


class Erasure(shapes.Body):
    """Whom to erase. `project` None means in every project, which takes a key for all of them."""

    kind: Literal["end_user", "session"]
    subject: str = Field(min_length=1, max_length=LONGEST_SUBJECT)
    project: str | None = None


@router.post("/preview")
def preview(caller: Admin, sent: Erasure) -> dict[str, Any]:
    """Rows by table that an erasure would touch now."""
    return {"rows": erasure_rows.preview(caller.session, _subject(caller, sent))}


@router.post("", status_code=202)
def erase(caller: Admin, sent: Erasure) -> dict[str, Any]:
    """Begin; 409 while the same erasure is under way."""
    return _shape(erasure.request(caller.session, _subject(caller, sent), caller.actor))


@router.get("")
def list_erasures(caller: Admin) -> dict[str, Any]:
    """Newest first, without their certificates."""
    return {"erasures": [_shape(one) for one in erasure.list_(caller.session, caller.key.project_id)]}


@router.get("/{request_id}")
def show(caller: Admin, request_id: UUID) -> dict[str, Any]:
    """How far it is, and its certificate once it is done."""
    found = erasure.get(caller.session, request_id, caller.key.project_id)
    return {**_shape(found), "certificate": found.certificate}


@router.post("/{request_id}/again", status_code=202)
def again(caller: Admin, request_id: UUID) -> dict[str, Any]:
    """Go on with one that failed; 409 for any other."""
    return _shape(erasure.again(caller.session, erasure.get(caller.session, request_id, caller.key.project_id)))


def _subject(caller: Caller, sent: Erasure) -> Subject:
    if sent.project is None:
        caller.everywhere()
        return erasure.checked(None, sent.kind, sent.subject)
    return erasure.checked(caller.project(sent.project).id, sent.kind, sent.subject)


def _shape(made: ErasureRequest) -> dict[str, Any]:
    return {
        "id": str(made.id), "kind": made.kind, "subject": made.subject, "state": made.state,
        "step": made.progress.get("step", "queued"), "rows": made.progress.get("counts", {}),
        "late_rows": made.late_rows, "error": made.progress.get("error"),
        "asked_by": made.asked_by, "created_at": shapes.moment(made.created_at),
        "finished_at": shapes.moment(made.finished_at),
    }  # fmt: skip


@spool_router.get("")
def list_spools(caller: Admin) -> dict[str, Any]:
    """Log spools that erasures wait for, the longest silent first; takes a key for all projects."""
    caller.everywhere()
    return {"spools": [_spool_shape(one) for one in erasure_spools.list_(caller.session)]}


@spool_router.post("/{spool_id}/forget")
def forget_spool(caller: Admin, spool_id: UUID) -> dict[str, Any]:
    """Its disk is gone: erasures wait for it no more. 409 while its shipper is alive."""
    caller.everywhere()
    return _spool_shape(erasure_spools.forget(caller.session, spool_id, caller.actor))


def _spool_shape(one: LogSpool) -> dict[str, Any]:
    return {"id": str(one.id), "host": one.host, "path": one.path, "seen_at": shapes.moment(one.seen_at)}
