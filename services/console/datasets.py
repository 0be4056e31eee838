"""Datasets: their revisions, what is inside and why, what changed, and the button that builds a new one."""

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.app import Streamed
from services.console.access import Here, Lead, Viewer
from services.console.lineage import draw
from services.console.mask import masks
from services.console.views import page
from services.errors import Conflict, NotFound
from services.store import (
    agreement,
    audit,
    dataset_export,
    datasets,
    imports,
    jobs,
    lineage,
    revision_diff,
    revisions,
    runs,
)
from services.store.forms import FORMS, Form
from services.store.models import Dataset, Revision, RevisionLeftOut, UserAccount
from services.store.revisions import Located

router = APIRouter()
SAMPLES = 20
CHANGES = 50
LINKS = 6
Name = Annotated[str, Path(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Digest = Annotated[str, Path(max_length=64)]
Split = Annotated[str, Query(pattern="^(train|held_out)?$")]


@router.get("/p/{slug}/datasets")
def dataset_list(request: Request, here: Viewer, building: bool = False, imported: int | None = None) -> Response:
    """Every dataset with its revisions, newest first."""
    found = datasets.list_(here.session, here.project.id)
    context = {
        "sets": [_described(here.session, dataset) for dataset in found],
        "default_name": runs.DEFAULT_DATASET,
        "building": building,
        "imported": imported,
        "agreement": request.app.state.figures.get(
            ("agreement", here.project.id), lambda: agreement.alpha(here.session, here.project.id)
        ),
    }
    return page(request, here, "datasets.html", context)


def _described(session: Session, dataset: Dataset) -> dict[str, Any]:
    listed = revisions.list_(session, dataset.id, limit=20)
    return {
        "dataset": dataset,
        "revisions": listed,
        "counts": revisions.counts(session, listed[0].id) if listed else None,
        "imports": imports.list_(session, dataset.id, limit=5),
    }


@router.get("/p/{slug}/datasets/{name}/{digest}")
def revision_page(
    request: Request,
    here: Viewer,
    name: Name,
    digest: Digest,
    split: Split = "",
    view: Annotated[str, Query(pattern="^(text|mask)$")] = "text",
    start: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> Response:
    """One immutable state of a dataset: its digest, counts, report, lineage, and samples of its rows."""
    dataset, revision = _found(here, name, digest)
    members = revisions.members(here.session, revision.id, split or None, limit=SAMPLES, offset=start)
    total = {"train": revision.train_count, "held_out": revision.held_out_count}
    shown = [member.example for member in members]
    traced = lineage.trace(here.session, here.project.id, revision)
    context = {
        "dataset": dataset,
        "revision": revision,
        "counts": revisions.counts(here.session, revision.id),
        "change": _change(here.session, dataset, revision),
        "members": members,
        "masks": masks(request.app.state.token_reader, shown) if view == "mask" else [None] * len(shown),
        "total": total.get(split, sum(total.values())),
        "split": split, "view": view, "start": start, "samples": SAMPLES, "forms": FORMS,
        "drawing": draw(here.project.slug, dataset.name, revision, traced),
        "links": _links(here.session, revision.id),
        "people": _people(here.session, [str(one["author"]) for one in _authors(revision)]),
        "twins": _twins(here.session, revision),
    }  # fmt: skip
    return page(request, here, "revision.html", context)


def _found(here: Here, name: str, digest: str) -> tuple[Dataset, Revision]:
    dataset = datasets.get(here.session, here.project.id, name)
    revision = revisions.find(here.session, dataset.id, digest)
    if revision is None:
        raise NotFound(f"dataset {name!r} has no revision {digest[:12]}")
    return dataset, revision


def _change(session: Session, dataset: Dataset, revision: Revision) -> revision_diff.Sizes | None:
    parent = revisions.find(session, dataset.id, revision.parent_digest or "")
    return revision_diff.sizes(session, parent, revision) if parent else None


def _links(session: Session, revision_id: UUID) -> dict[str, list[UUID]]:
    """The first interactions left out for each cause."""
    place = func.row_number().over(partition_by=RevisionLeftOut.cause, order_by=RevisionLeftOut.position)
    ranked = (
        select(RevisionLeftOut.cause, RevisionLeftOut.interaction_id, place.label("place"))
        .where(RevisionLeftOut.revision_id == revision_id, RevisionLeftOut.interaction_id.is_not(None))
        .subquery()
    )
    found: dict[str, list[UUID]] = {}
    for row in session.execute(select(ranked).where(ranked.c.place <= LINKS).order_by(ranked.c.place)):
        found.setdefault(row.cause, []).append(row.interaction_id)
    return found


def _authors(revision: Revision) -> list[dict[str, Any]]:
    return [*revision.report.get("authors", []), *revision.report.get("phrases", [])]


def _people(session: Session, ids: Sequence[str]) -> dict[str, str]:
    """Names by id; what is no person's id keeps its own name."""
    wanted = select(UserAccount.id, UserAccount.name, UserAccount.email).where(UserAccount.id.in_(_uuids(ids)))
    named = {str(row.id): row.name or row.email for row in session.execute(wanted)}
    return {one: named.get(one, one) for one in ids}


def _uuids(ids: Sequence[str]) -> list[UUID]:
    found = []
    for one in ids:
        try:
            found.append(UUID(one))
        except ValueError:
            continue  # an API key's name
    return found


def _twins(session: Session, revision: Revision) -> int:
    """How many revisions of the dataset have this very held-out part, this one included."""
    same = select(func.count()).where(
        Revision.dataset_id == revision.dataset_id, Revision.held_out_digest == revision.held_out_digest
    )
    return session.scalar(same) or 1


@router.get("/p/{slug}/datasets/{name}/{digest}/diff")
def diff_page(
    request: Request, here: Viewer, name: Name, digest: Digest, against: Annotated[str, Query(max_length=64)] = ""
) -> Response:
    """What changed against another revision (the parent, unless asked otherwise), and why."""
    dataset, revision = _found(here, name, digest)
    others = [one for one in revisions.list_(here.session, dataset.id) if one.id != revision.id]
    chosen = against or revision.parent_digest or ""
    old = revisions.find(here.session, dataset.id, chosen)
    if old is None:
        raise NotFound(
            f"there is no revision {chosen[:12]!r} to compare with" if chosen else "it is the first revision"
        )
    explained = revision_diff.explain(here.session, old, revision)
    context = {
        "dataset": dataset, "revision": revision, "old": old, "others": others, "kept": explained.kept,
        "causes": explained.causes(), "changes": explained.changes[:CHANGES], "total": len(explained.changes),
    }  # fmt: skip
    return page(request, here, "revision_diff.html", context)


@router.get("/p/{slug}/datasets/{name}/{digest}/export")
def export(
    request: Request, here: Lead, name: Name, digest: Digest, form: Form = "prompt-completion", split: Split = ""
) -> Streamed:
    """The examples as a JSONL file in one of TRL's forms."""
    dataset, revision = _found(here, name, digest)
    detail = {"form": form, "split": split or None}
    audit.record(here.session, here.user.email, "dataset.export", f"revision:{revision.digest}", detail)
    file_name = dataset_export.file_name(Located(here.project, dataset, revision), form, split or None)
    streamed = dataset_export.lines(request.app.state.sessions, revision.id, form, split or None)
    headers = {"content-disposition": f'attachment; filename="{file_name}"'}
    return Streamed(streamed, "application/x-ndjson", headers)


@router.post("/p/{slug}/datasets/{name}/{digest}/rebuild")
def rebuild(request: Request, here: Viewer, name: Name, digest: Digest) -> Response:
    """Hash everything again and show whether it is still the same."""
    dataset, revision = _found(here, name, digest)
    context = {"dataset": dataset, "revision": revision, "made": revisions.rebuild(here.session, revision.id)}
    return page(request, here, "revision_rebuilt.html", context)


@router.post("/p/{slug}/datasets/{name}/build")
def build(here: Lead, name: Name) -> Response:
    """Queue a build; pressing twice queues one."""
    payload = {"project_id": str(here.project.id), "dataset": name}
    try:
        jobs.enqueue(
            here.session,
            "dataset.build",
            payload,
            project_id=here.project.id,
            dedupe_key=f"dataset.build:{here.project.id}:{name}",
        )
    except Conflict:
        return RedirectResponse(f"/p/{here.project.slug}/datasets?building=1", status_code=303)
    audit.record(here.session, here.user.email, "dataset.build", f"project:{here.project.id}", {"dataset": name})
    return RedirectResponse(f"/p/{here.project.slug}/datasets?building=1", status_code=303)
