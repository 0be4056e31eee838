"""Bringing examples in from a file: choose it, see what each row becomes, then all of them or none."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.responses import RedirectResponse
from pydantic import BaseModel

from services.console.access import Here, Lead
from services.console.datasets import Name
from services.console.views import page
from services.errors import Unprocessable
from services.store import datasets, imports
from services.store.import_files import ROWS_MOST
from services.store.models import Dataset, DatasetImport

router = APIRouter()


class MappingForm(BaseModel):
    """Which column each field comes from; the names are those of `imports.FIELDS`."""

    prompt: str = ""
    system: str = ""
    messages: str = ""
    completion: str = ""
    chosen: str = ""
    rejected: str = ""
    label: str = ""
    tools: str = ""
    group: str = ""


@router.get("/p/{slug}/datasets/{name}/import")
def choose(request: Request, here: Lead, name: Name) -> Response:
    """The form that takes a file."""
    limit = request.app.state.settings.max_body_bytes
    context = {"name": name, "fields": imports.FIELDS, "bytes_most": limit, "rows_most": ROWS_MOST}
    return page(request, here, "import.html", context)


@router.post("/p/{slug}/datasets/{name}/import")
def upload(here: Lead, name: Name, file: UploadFile) -> Response:
    """Keep the file for its preview."""
    if not file.filename:
        raise Unprocessable("choose a file first", param="file")
    dataset = datasets.get_or_create(here.session, here.project.id, name)
    made = imports.begin(here.session, dataset, file.filename, file.file.read(), here.user.email)
    return RedirectResponse(f"/p/{here.project.slug}/datasets/{name}/imports/{made.id}", status_code=303)


@router.get("/p/{slug}/datasets/{name}/imports/{import_id}")
def preview(request: Request, here: Lead, name: Name, import_id: UUID) -> Response:
    """What the rows become under a mapping, which the page's own form changes through the address."""
    _, record = _found(here, name, import_id)
    mapping = {field: request.query_params.get(field, "")[:300] for field in imports.FIELDS}
    parsed, refusal = None, None
    try:
        chosen = mapping if any(mapping.values()) else None
        parsed = imports.parse(record.file_name, record.content or b"", chosen, str(here.user.id))
        refusal = parsed.refusal
    except Unprocessable as error:
        refusal = error.message
    columns = parsed.columns if parsed else imports.columns_of(record)
    context = {
        "name": name, "record": record, "parsed": parsed, "refusal": refusal, "columns": columns,
        "mapping": parsed.mapping if parsed else mapping, "fields": imports.FIELDS,
        "samples": parsed.drafts[: imports.SAMPLES] if parsed else [],
    }  # fmt: skip
    return page(request, here, "import_preview.html", context)


@router.post("/p/{slug}/datasets/{name}/imports/{import_id}")
def finish(here: Lead, name: Name, import_id: UUID, mapped: Annotated[MappingForm, Form()]) -> Response:
    """Every row, or none."""
    mapping = mapped.model_dump()
    dataset, record = _found(here, name, import_id)
    done = imports.finish(here.session, record, mapping, str(here.user.id))
    imports.record(here.session, done, dataset, here.user.email)
    return RedirectResponse(f"/p/{here.project.slug}/datasets?imported={done.rows}", status_code=303)


@router.post("/p/{slug}/datasets/{name}/imports/{import_id}/discard")
def discard(here: Lead, name: Name, import_id: UUID) -> Response:
    """Forget the file."""
    _, record = _found(here, name, import_id)
    imports.discard(here.session, record)
    return RedirectResponse(f"/p/{here.project.slug}/datasets", status_code=303)


def _found(here: Here, name: str, import_id: UUID) -> tuple[Dataset, DatasetImport]:
    dataset = datasets.get(here.session, here.project.id, name)
    return dataset, imports.get(here.session, dataset, import_id)
