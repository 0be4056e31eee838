"""The admin API's part on golden data: what a revision holds and whether it is what it says, rows in and out."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request

from services.admin.access import Caller, Trainer
from services.app import Streamed
from services.errors import InvalidRequest, Unprocessable
from services.store import audit, dataset_export, datasets, imports, revision_diff, revisions
from services.store.forms import Form
from services.store.models import Example
from services.store.revision_diff import Change
from services.store.revisions import Located

router = APIRouter(prefix="/api")
Digest = Annotated[str, Path(min_length=8, max_length=64, pattern="^[0-9a-f]+$")]
Name = Annotated[str, Path(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Split = Annotated[str | None, Query(pattern="^(train|held_out)$")]
LISTED = 200


def _found(caller: Caller, digest: str) -> Located:
    return revisions.locate(caller.session, digest, project_id=caller.key.project_id)


@router.get("/revisions/{digest}")
def show_revision(caller: Trainer, digest: Digest) -> dict[str, Any]:
    """Where a revision is and what it holds."""
    found = _found(caller, digest)
    counts = revisions.counts(caller.session, found.revision.id)
    return {**dataset_export.described(found), "counts": counts, "report": found.revision.report}


@router.post("/revisions/{digest}/rebuild")
def rebuild(caller: Trainer, digest: Digest) -> dict[str, Any]:
    """Hash every example and the manifest again; `same` says whether that gives the revision's digest."""
    found = _found(caller, digest)
    made = revisions.rebuild(caller.session, found.revision.id)
    return {
        **dataset_export.described(found), "rebuilt_digest": made.digest, "examples": made.examples,
        "erased": made.erased,
        "rebuilt_held_out_digest": made.held_out_digest, "changed": [str(one) for one in made.changed[:LISTED]],
        "same": made.digest == found.revision.digest and not made.changed,
    }  # fmt: skip


@router.get("/revisions/{digest}/diff/{other}")
def diff(caller: Trainer, digest: Digest, other: Digest) -> dict[str, Any]:
    """What `other` changed against `digest`, by cause, and the first rows."""
    old, new = _found(caller, digest), _found(caller, other)
    if old.project.id != new.project.id:
        raise InvalidRequest("these are revisions of two projects; their rows have nothing in common")
    explained = revision_diff.explain(caller.session, old.revision, new.revision)
    return {
        "old": dataset_export.described(old), "new": dataset_export.described(new), "kept": explained.kept,
        "causes": explained.causes(), "changes": [_change(one) for one in explained.changes[:LISTED]],
    }  # fmt: skip


def _change(one: Change) -> dict[str, Any]:
    return {"kind": one.kind, "why": one.why, "before": _example(one.before), "after": _example(one.after)}


def _example(row: Example | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "id": str(row.id), "content_hash": row.content_hash, "split": row.split, "source": row.source,
        "interaction_id": str(row.interaction_id) if row.interaction_id else None, "completion": row.completion,
        "reviewers": row.reviewers,
    }  # fmt: skip


@router.get("/revisions/{digest}/rows")
def rows(
    request: Request, caller: Trainer, digest: Digest, form: Form = "prompt-completion", split: Split = None
) -> Streamed:
    """The examples as lines of JSON in one of TRL's forms."""
    found = _found(caller, digest)
    detail = {"form": form, "split": split}
    audit.record(caller.session, caller.actor, "dataset.export", f"revision:{found.revision.digest}", detail)
    streamed = dataset_export.lines(request.app.state.sessions, found.revision.id, form, split)
    return Streamed(streamed, "application/x-ndjson")


@router.post("/p/{slug}/datasets/{name}/imports", status_code=201)
def import_file(
    caller: Trainer,
    slug: str,
    name: Name,
    content: Annotated[bytes, Body(media_type="application/octet-stream")],
    file_name: Annotated[str, Query(max_length=200)],
    mapping: Annotated[str, Query(max_length=4000)] = "",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Import a JSONL, CSV or Parquet file whole or, when one row is bad, not at all; 422 names the first bad row."""
    project = caller.project(slug)
    chosen = _mapping(mapping)
    parsed = imports.parse(file_name, content, chosen, caller.actor)
    preview = {
        "format": parsed.format, "columns": parsed.columns, "mapping": parsed.mapping, "rows": parsed.rows,
        "repeats": len(parsed.repeats), "errors": [error._asdict() for error in parsed.errors],
        "error_count": parsed.error_count,
    }  # fmt: skip
    if dry_run:
        return {**preview, "imported": 0, "duplicates": 0}
    if parsed.refusal:
        raise Unprocessable(parsed.refusal)
    dataset = datasets.get_or_create(caller.session, project.id, name)
    done = imports.finish(
        caller.session, imports.begin(caller.session, dataset, file_name, content, caller.actor), chosen, caller.actor
    )
    imports.record(caller.session, done, dataset, caller.actor)
    return {**preview, "imported": done.rows, "duplicates": done.duplicates}


def _mapping(text: str) -> dict[str, str] | None:
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidRequest("mapping is no JSON object of fields and columns", param="mapping") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InvalidRequest("mapping is no JSON object of fields and columns", param="mapping")
    return found
