"""What was made of erased rows: runs that read them, revisions that hold them, artefacts and exports made of them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Select, func, or_, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import lifecycle, revisions, rollouts, runs, speculators
from services.store.erasure_rows import noted
from services.store.models import (
    Artifact,
    AuditEvent,
    Dataset,
    Deployment,
    ErasureRequest,
    Revision,
    RevisionExample,
    Run,
    RunExample,
)
from worker.erasure import progress

EXPORTS = ("dataset.export", "interactions.export")
ACTOR = "erasure"
TAINTED = "trained on data that has been erased since"


def _holding(made: ErasureRequest, split: str | None = None) -> Select[UUID]:
    """Revisions that hold a row which this request has erased."""
    query = select(RevisionExample.revision_id).where(RevisionExample.example_id.in_(noted(made, "example")))
    return query.where(RevisionExample.split == split) if split else query


# --- runs -------------------------------------------------------------------------------------------------


def _replaying(made: ErasureRequest) -> Select[UUID]:
    """Runs that were given erased rows of older revisions again."""
    return select(RunExample.run_id).where(RunExample.example_id.in_(noted(made, "example")))


def stop_runs(session: Session, made: ErasureRequest) -> bool:
    """Ask unfinished runs on such a revision to stop, and those that read that log; whether there was a new one."""
    logged = [UUID(one) for one in made.progress.get("spans", {})]
    reading_log = (Run.kind == "speculator") & Run.project_id.in_(logged)
    known = [UUID(one) for one in made.progress.get("runs_stopped", [])]
    unfinished = select(Run.id).where(
        Run.state.in_(runs.UNFINISHED),
        or_(Run.revision_id.in_(_holding(made)), Run.id.in_(_replaying(made)), reading_log),
        Run.id.not_in(known),
    )
    stopped = []
    for run_id in session.scalars(unfinished).all():
        try:
            runs.request_cancel(session, run_id)
        except Conflict:
            continue
        stopped.append(str(run_id))
    progress.add(made, "runs_stopped", stopped)
    return bool(stopped)


def unfinished(session: Session, made: ErasureRequest) -> str | None:
    """A stopped run that has not ended yet, in words."""
    stopped = [UUID(one) for one in made.progress.get("runs_stopped", [])]
    waiting = select(Run.id).where(Run.id.in_(stopped), Run.state.in_(runs.UNFINISHED))
    found = session.scalar(waiting.limit(1))
    return f"run {found} has read what is erased and does not stop: is its worker alive?" if found else None


# --- revisions and artefacts ------------------------------------------------------------------------------


def rebuild(session: Session, made: ErasureRequest) -> list[dict[str, Any]]:
    """The newest revision of each dataset again, without them. Older ones stay, as hashes without text."""
    holding = select(Revision.dataset_id).where(Revision.id.in_(_holding(made)))
    # A revision's making locks its project: always in this order.
    ordered = select(Dataset).where(Dataset.id.in_(holding)).order_by(Dataset.project_id, Dataset.id)
    gone = set(session.scalars(noted(made, "example")))
    rebuilt = []
    for dataset in session.scalars(ordered).all():
        newest = revisions.latest(session, dataset.id)
        assert newest is not None, "one of its revisions holds an erased row"
        listed = revisions.entries(session, newest.id)
        kept = [entry for entry in listed if entry.example_id not in gone]
        erased = len(listed) - len(kept)
        if erased:
            report = {**newest.report, "erased": erased}
            digest = revisions.create(session, dataset, kept, report).digest if kept else None
            rebuilt.append({"dataset": dataset.name, "from": newest.digest, "to": digest, "examples_erased": erased})
    return rebuilt


def taint(session: Session, made: ErasureRequest, projects: list[UUID]) -> list[dict[str, Any]]:
    """Adapters trained on such a revision and heads trained on that part of the log: deployed nowhere any more.

    A trial of theirs ends: it could only serve more users and never end well. What is live goes on serving.
    """
    # Whoever changes a deployment locks its row before its artefacts.
    held = session.scalars(select(Deployment).where(Deployment.project_id.in_(projects)).with_for_update()).all()
    reading = or_(Run.revision_id.in_(_holding(made, "train")), Run.id.in_(_replaying(made)))
    trained = select(Run.id).where(reading)
    untainted = select(Artifact).where(Artifact.project_id.in_(projects), Artifact.tainted_at.is_(None))
    found = list(session.scalars(untainted.where(Artifact.run_id.in_(trained))))
    spans = made.progress.get("spans", {})
    heads = session.scalars(untainted.where(Artifact.kind == "speculator"))
    found += [one for one in heads if _read_span(one, spans.get(str(one.project_id)))]
    session.execute(
        update(Artifact).where(Artifact.digest.in_([one.digest for one in found])).values(tainted_at=func.now())
    )
    lifecycle.mend_last_good(session, [one.digest for one in found])
    for deployment in held:
        _end_trials(session, deployment, {one.digest for one in found})
    return [{"digest": one.digest, "kind": one.kind, "state": one.state} for one in found]


def _end_trials(session: Session, deployment: Deployment, tainted: set[str]) -> None:
    """Of a candidate and of heads. Retired, not condemned: the figures said nothing against them."""
    if deployment.canary_digest in tainted:
        rollouts.end(session, deployment.project_id, "stopped", rollouts.Decision(ACTOR, TAINTED, {}))
    if deployment.speculator_canary_digest in tainted:
        speculators.withdraw_canary(session, deployment.project_id, speculators.Decision(ACTOR, TAINTED, {}))


def _read_span(artifact: Artifact, span: list[str] | None) -> bool:
    """Whether heads were trained on a window of the log that holds something of the span. One that does not say where
    its window begins may have read anything."""
    if span is None:
        return False
    window = artifact.manifest.get("window") or {}
    first, last = window.get("first"), window.get("last") or artifact.created_at
    return (first is None or progress.utc(first) <= span[1]) and span[0] <= progress.utc(last)


# --- what was given out -----------------------------------------------------------------------------------


def exported(session: Session, made: ErasureRequest, projects: list[UUID]) -> list[dict[str, Any]]:
    """Exports that held erased rows, or may have: files that somebody has and Whet does not reach.

    Of a dataset those of the very revisions; of the log those of its project since the subject's first answer there.
    """
    digests = select("revision:" + Revision.digest).where(Revision.id.in_(_holding(made)))
    spans = made.progress.get("spans", {})
    of_log = [
        (AuditEvent.subject == f"project:{one}") & (AuditEvent.at >= datetime.fromisoformat(spans[str(one)][0]))
        for one in projects
        if str(one) in spans
    ]
    found = select(AuditEvent.id, AuditEvent.at, AuditEvent.action, AuditEvent.subject).where(
        AuditEvent.action.in_(EXPORTS), or_(AuditEvent.subject.in_(digests), *of_log)
    )
    return [
        {"audit_event": row.id, "at": progress.utc(row.at), "what": row.action, "of": row.subject}
        for row in session.execute(found.order_by(AuditEvent.id))
    ]
