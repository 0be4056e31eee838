"""The admin API's part on artefacts: one with what taught it and where it answered, and a note that it was exported."""

from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import Field

from services.admin import shapes
from services.admin.access import Caller, Trainer
from services.errors import NotFound
from services.store import artifact_view, audit
from services.store.models import Artifact

router = APIRouter(prefix="/api/artifacts/{digest}")
Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]


class Export(shapes.Body):
    """What it was written for."""

    to: str = Field(max_length=100, pattern=r"^[\w.-]+$")


@router.get("")
def show_artifact(caller: Trainer, digest: Digest) -> dict[str, Any]:
    """What it was trained on, who judged it, where it served, and how much it answered."""
    found = artifact_view.about(caller.session, _own(caller, digest).project_id, digest)
    answered = artifact_view.answered(caller.session, found.artifact)
    return {
        "digest": digest, "kind": found.artifact.kind, "state": found.artifact.state,
        "tainted_at": shapes.moment(found.artifact.tainted_at), "manifest": found.artifact.manifest,
        "run": shapes.run(found.run) if found.run else None,
        "revision": shapes.revision(found.revision) if found.revision else None,
        "replayed": found.replayed,
        "evaluations": [shapes.evaluation(row) for row in found.evaluations],
        "served": [
            {"as": span.how, "generation": span.generation, "since": shapes.moment(span.since),
             "until": shapes.moment(span.until)}
            for span in found.spans
        ],
        "answered": answered.by_origin, "failed": answered.failed,
    }  # fmt: skip


@router.post("/exports", status_code=201)
def note_export(caller: Trainer, digest: Digest, sent: Export) -> dict[str, Any]:
    """Note in the audit log that it was taken to another server."""
    event = audit.record(
        caller.session, caller.actor, "artifact.export", f"artifact:{_own(caller, digest).digest}", {"to": sent.to}
    )
    return {"digest": digest, "at": shapes.moment(event.at)}


def _own(caller: Caller, digest: str) -> Artifact:
    artifact = caller.session.get(Artifact, digest)
    if artifact is None or caller.key.project_id not in (None, artifact.project_id):
        raise NotFound(f"there is no artefact {digest[:12]}")
    return artifact
