"""The certificate of an erasure: what was found and done, what cannot be undone, and a hash over all of it."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store.examples import digest_of
from services.store.models import ErasureRequest, ErasureSpool, Project

FORMAT = 2
CANNOT_BE_UNDONE = (
    "Weights trained on the data keep what they learned; nothing here unlearns.",
    "Artefacts that learned it are tainted and deployed nowhere any more; one that serves now serves until replaced.",
    "Responses that were sent are with whoever received them.",
    "Backups and replicas of the database, logs of apps and proxies are not reached.",
    "Exports that were taken elsewhere are listed, not reached; so are files below exports/ that cannot be searched.",
    "Log files of Whet's processes, in which an error may quote a few words of what it is about, are not reached.",
    "Drafts kept in reviewers' browsers are not reached.",
    "Postgres keeps deleted rows in its files until it vacuums them, and in its write-ahead log until that is reused.",
    "Text that somebody copied into a project's guidelines, a reason or a name is not recognised as the subject's.",
    "Review items and examples whose log has passed its retention are found by the group, if the app gave no other.",
)


def certify(session: Session, made: ErasureRequest) -> dict[str, Any]:
    """The certificate of a finished request, whose subject is a hash by now. `hash` is over everything else."""
    progress = made.progress
    project = session.get(Project, made.project_id) if made.project_id else None
    document: dict[str, Any] = {
        "format": FORMAT,
        "id": str(made.id),
        "kind": made.kind,
        "subject": made.subject,
        "project": project.slug if project else None,
        "asked_by": made.asked_by,
        "asked_at": made.created_at.isoformat(),
        "finished_at": made.finished_at.isoformat() if made.finished_at else None,
        "rows": progress.get("counts", {}),
        "spool_records": session.scalar(select(ErasureRequest.spool_records).where(ErasureRequest.id == made.id)),
        "engine_forgot": [name for _, name in progress.get("namespaces", [])],
        "runs_stopped": progress.get("runs_stopped", []),
        "revisions": progress.get("revisions", []),
        "tainted": progress.get("tainted", []),
        "spools": _spools(session, made),
        "exports": progress.get("exports", []),
        "exports_not_searched": progress.get("exports_not_searched", []),
        "retrain": "train again on the rebuilt revisions" if progress.get("tainted") else None,
        "cannot_be_undone": list(CANNOT_BE_UNDONE),
    }
    return document | {"hash": digest_of(document)}


def _spools(session: Session, made: ErasureRequest) -> list[dict[str, Any]]:
    """Which log spools were cleaned; one that somebody gave up stands in the audit log."""
    found = select(ErasureSpool).where(ErasureSpool.request_id == made.id).order_by(ErasureSpool.spool_id)
    return [{"spool": str(one.spool_id), "records": one.records} for one in session.scalars(found)]


def verified(certificate: dict[str, Any]) -> bool:
    """Whether a certificate is as it was issued."""
    return certificate.get("hash") == digest_of({name: value for name, value in certificate.items() if name != "hash"})
