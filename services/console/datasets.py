"""Datasets: their revisions, what is inside, and the button that builds a new one."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy.orm import Session

from services.console.access import Lead, Viewer
from services.console.views import page
from services.errors import Conflict, NotFound
from services.store import audit, datasets, jobs, runs
from services.store.models import Dataset, Revision

router = APIRouter()
SAMPLES = 20
Name = Annotated[str, Path(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


@router.get("/p/{slug}/datasets")
def dataset_list(request: Request, here: Viewer, building: bool = False) -> Response:
    """Every dataset with its revisions, newest first."""
    found = datasets.list_(here.session, here.project.id)
    context = {
        "sets": [_described(here.session, dataset) for dataset in found],
        "default_name": runs.DEFAULT_DATASET,
        "building": building,
    }
    return page(request, here, "datasets.html", context)


def _described(session: Session, dataset: Dataset) -> dict[str, Any]:
    revisions = datasets.revisions(session, dataset.id, limit=20)
    return {
        "dataset": dataset,
        "revisions": revisions,
        "counts": datasets.counts(session, revisions[0].id) if revisions else None,
    }


@router.get("/p/{slug}/datasets/{name}/{digest}")
def revision_page(
    request: Request,
    here: Viewer,
    name: Name,
    digest: Annotated[str, Path(max_length=64)],
    split: Annotated[str, Query(pattern="^(train|held_out)?$")] = "",
) -> Response:
    """One immutable state of a dataset: its digest, counts, report, and samples of its rows."""
    dataset = datasets.get(here.session, here.project.id, name)
    revision = datasets.find_revision(here.session, dataset.id, digest)
    if revision is None:
        raise NotFound(f"dataset {name!r} has no revision {digest[:12]}")
    members = datasets.members(here.session, revision.id, split or None)
    context = {
        "dataset": dataset,
        "revision": revision,
        "counts": datasets.counts(here.session, revision.id),
        "change": _change(here.session, dataset, revision),
        "members": members[:SAMPLES],
        "total": len(members),
        "split": split,
    }
    return page(request, here, "revision.html", context)


def _change(session: Session, dataset: Dataset, revision: Revision) -> datasets.Diff | None:
    parent = datasets.find_revision(session, dataset.id, revision.parent_digest or "")
    return datasets.diff(session, parent, revision) if parent else None


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
