"""The "erase" job: takes a subject out of the spool, the tables, revisions, files and the engine, then certifies it.

Any number of attempts, killed anywhere, leave the same: each step finds what is still there, and counts add up in the
request's own row, in the transaction of what they count.
"""

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session

from engine.sync_client import SyncEngineClient
from services.errors import Conflict
from services.settings import Settings
from services.store import audit, datasets, erasure, runs
from services.store.certificate import certify
from services.store.datasets import ERASED
from services.store.jobs import JobCancelled, Lease
from services.store.models import (
    Artifact,
    Dataset,
    ErasureRequest,
    Example,
    Interaction,
    Project,
    Revision,
    RevisionExample,
    Run,
    RunExample,
)

CONNECT_SECONDS = 30.0
BATCH = 200
# The longest answers still being given, and a shipper that is being restarted.
SPOOL_SECONDS = 300.0
POLL_SECONDS = 0.2

log = structlog.get_logger()


def erase_job(lease: Lease, settings: Settings) -> None:
    """Handler of "erase". Raises RuntimeError when the shipper does not answer; another attempt goes on."""
    request_id = UUID(lease.payload["request_id"])
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        if made.state == "done":
            return
        made.state = "running"
    _wait_for_spool(lease, request_id)
    while _erase_batch(lease, request_id):
        if lease.cancelled():
            raise JobCancelled
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        _count(made, {"feedback": erasure.erase_said(session, made)})
        _step(made, "rebuilding revisions")
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        _follow_up(session, made)
        _step(made, "forgetting in the engine")
    _clean_files(lease, request_id, settings)
    _forget(lease, request_id, settings)
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        _finish(session, made)
        lease.succeed(session)
    log.info("erasure done", request=str(request_id))


def _wait_for_spool(lease: Lease, request_id: UUID) -> None:
    """Tables come after the spool: what the shipper still has to recognise, it recognises by them."""
    with lease.transaction() as session:
        _step(erasure.get(session, request_id), "waiting for the log to be shipped")
    deadline = time.monotonic() + SPOOL_SECONDS
    while True:
        with lease.sessions() as session:
            if erasure.get(session, request_id).spool_clean_at is not None:
                return
        if lease.cancelled():
            raise JobCancelled
        if time.monotonic() > deadline:
            raise RuntimeError("the shipper has not cleaned the log spool: is it running? (`whet doctor` says)")
        time.sleep(POLL_SECONDS)


def _erase_batch(lease: Lease, request_id: UUID) -> bool:
    """One page of interactions with all that was made of them; False when there is none left."""
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        ids = erasure.next_interactions(session, made, BATCH)
        if not ids:
            return False
        _note_traffic(session, made, ids)
        counts = erasure.erase(session, ids)
        _count(made, counts)
        _step(made, f"erased {made.progress['counts'].get('interaction', 0)} interactions")
        return True


def _note_traffic(session: Session, made: ErasureRequest, ids: list[UUID]) -> None:
    """Which projects and namespaces they were in, and when: that is how heads that read them are found."""
    rows = session.execute(
        select(
            Interaction.project_id, Interaction.namespace, func.min(Interaction.started_at),
            func.max(Interaction.started_at),
        )
        .where(Interaction.id.in_(ids))
        .group_by(Interaction.project_id, Interaction.namespace)
    ).all()  # fmt: skip
    progress = dict(made.progress)
    namespaces = {(project, name) for project, name in progress.get("namespaces", [])}
    spans = {project: list(span) for project, span in progress.get("spans", {}).items()}
    for project_id, namespace, first, last in rows:
        namespaces.add((str(project_id), namespace))
        known = spans.get(str(project_id), [first.isoformat(), last.isoformat()])
        spans[str(project_id)] = [min(known[0], first.isoformat()), max(known[1], last.isoformat())]
    progress["namespaces"] = sorted([project, name] for project, name in namespaces)
    progress["spans"] = spans
    made.progress = progress


def _count(made: ErasureRequest, counts: Mapping[str, int]) -> None:
    total = Counter(made.progress.get("counts", {}))
    total.update({table: count for table, count in counts.items() if count})
    made.progress = {**made.progress, "counts": dict(total)}


def _step(made: ErasureRequest, words: str) -> None:
    made.progress = {**made.progress, "step": words}


# --- what was made of them --------------------------------------------------------------------------------


def _follow_up(session: Session, made: ErasureRequest) -> None:
    """Runs that are reading stop, revisions are rebuilt without the rows, artefacts that learned them are marked."""
    projects = _projects(session, made)
    quotes = erasure.forget_quotes(session, projects, made.created_at)
    shown, typed = erasure.forget_shown(session, projects), erasure.forget_typed(session, made, projects)
    _count(made, {"job": quotes, "prompts_that_showed_an_example": shown, "typed_by_people": typed})
    found = made.progress | {
        "runs_stopped": made.progress.get("runs_stopped", []) + _stop_runs(session, made, projects),
        "revisions": made.progress.get("revisions", []) + _rebuild(session, projects),
        "tainted": made.progress.get("tainted", []) + _taint(session, made, projects),
    }
    made.progress = found


def _projects(session: Session, made: ErasureRequest) -> list[UUID]:
    """All it may concern: a request for every project names none."""
    if made.project_id is not None:
        return [made.project_id]
    return list(session.scalars(select(Project.id)))


def _revisions_with_erased(split: str | None = None):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a query
    query = select(RevisionExample.revision_id).join(Example, Example.id == RevisionExample.example_id)
    query = query.where(Example.content_hash.startswith(ERASED))
    return query.where(RevisionExample.split == split) if split else query


def _runs_replaying_erased() -> Select[UUID]:
    query = select(RunExample.run_id).join(Example, Example.id == RunExample.example_id)
    return query.where(Example.content_hash.startswith(ERASED))


def _stop_runs(session: Session, made: ErasureRequest, projects: list[UUID]) -> list[str]:
    """Unfinished runs on such a revision, and those that read that log: what they wrote down is erased data."""
    logged = [UUID(one) for one in made.progress.get("spans", {})]
    reading_log = (Run.kind == "speculator") & Run.project_id.in_(logged)
    reading = Run.revision_id.in_(_revisions_with_erased()) | Run.id.in_(_runs_replaying_erased()) | reading_log
    unfinished = select(Run.id).where(Run.project_id.in_(projects), Run.state.in_(runs.UNFINISHED), reading)
    stopped = []
    for run_id in session.scalars(unfinished).all():
        try:
            runs.request_cancel(session, run_id)
        except Conflict:
            continue
        stopped.append(str(run_id))
    return stopped


def _rebuild(session: Session, projects: list[UUID]) -> list[dict[str, Any]]:
    """The newest revision of each data set again, without them. Older ones stay, as hashes without text."""
    rebuilt = []
    for dataset in session.scalars(select(Dataset).where(Dataset.project_id.in_(projects))).all():
        newest = datasets.latest_revision(session, dataset.id)
        if newest is None or not _holds_erased(session, newest):
            continue
        gone_ids = set(
            session.scalars(
                _revisions_with_erased().with_only_columns(Example.id).where(RevisionExample.revision_id == newest.id)
            )
        )
        kept = [entry for entry in datasets.entries(session, newest.id) if entry.example_id not in gone_ids]
        gone = newest.train_count + newest.held_out_count - len(kept)
        made = datasets.create_revision(session, dataset, kept, {**newest.report, "erased": gone}) if kept else None
        digest = made.digest if made else None
        rebuilt.append({"dataset": dataset.name, "from": newest.digest, "to": digest, "examples_erased": gone})
    return rebuilt


def _holds_erased(session: Session, revision: Revision) -> bool:
    holding = _revisions_with_erased().where(RevisionExample.revision_id == revision.id)
    return session.scalar(holding.limit(1)) is not None


def _taint(session: Session, made: ErasureRequest, projects: list[UUID]) -> list[dict[str, Any]]:
    """Adapters trained on such a revision and heads trained on that part of the log: deployed nowhere any more."""
    reading = Run.revision_id.in_(_revisions_with_erased("train")) | Run.id.in_(_runs_replaying_erased())
    trained = select(Run.id).where(reading)
    adapters = select(Artifact).where(
        Artifact.project_id.in_(projects), Artifact.tainted_at.is_(None), Artifact.run_id.in_(trained)
    )
    tainted = list(session.scalars(adapters))
    heads = select(Artifact).where(
        Artifact.project_id.in_(projects), Artifact.tainted_at.is_(None), Artifact.kind == "speculator"
    )
    spans = made.progress.get("spans", {})
    tainted += [one for one in session.scalars(heads) if _read_span(one, spans.get(str(one.project_id)))]
    session.execute(
        update(Artifact).where(Artifact.digest.in_([one.digest for one in tainted])).values(tainted_at=func.now())
    )
    return [{"digest": one.digest, "kind": one.kind, "state": one.state} for one in tainted]


def _read_span(artifact: Artifact, span: list[str] | None) -> bool:
    """Whether heads were trained on a window of the log that holds something of the span."""
    window = artifact.manifest.get("window") or {}
    if span is None:
        return False
    first, last = str(window.get("first", "")), str(window.get("last", artifact.created_at.isoformat()))
    return first <= span[1] and span[0] <= last


# --- files and the engine ---------------------------------------------------------------------------------


def _clean_files(lease: Lease, request_id: UUID, settings: Settings) -> None:
    """What trainings wrote down beside their artefacts, and exports, which anybody can make again."""
    with lease.sessions() as session:
        made = erasure.get(session, request_id)
        projects = _projects(session, made)
        over = select(Run.id).where(Run.project_id.in_(projects), Run.created_at <= made.created_at)
        finished = set(session.scalars(over.where(Run.state.not_in(runs.UNFINISHED))))
    removed = 0
    for run_id in finished:
        work = settings.home / "runs" / str(run_id)
        if work.exists():
            shutil.rmtree(work, ignore_errors=True)
            removed += 1
    removed += _remove_exports(settings.home / "exports", made.created_at.timestamp())
    with lease.transaction() as session:
        _count(erasure.get(session, request_id), {"files": removed})


def _remove_exports(directory: Path, until: float) -> int:
    """Files made before the request; a packed one cannot be searched, so none is trusted to hold nothing."""
    removed = 0
    for path in sorted(directory.rglob("*")) if directory.is_dir() else ():
        if path.is_symlink() or (path.is_file() and path.stat().st_mtime <= until):
            path.unlink()
            removed += 1
    return removed


def _forget(lease: Lease, request_id: UUID, settings: Settings) -> None:
    """Suffix corpora and cached KV of the namespaces; the dispatcher fills the corpora again with what is left."""
    with lease.sessions() as session:
        made = erasure.get(session, request_id)
        namespaces = {(str(one), one.hex) for one in _projects(session, made)}
        namespaces |= {(project, name) for project, name in made.progress.get("namespaces", [])}
    with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
        for _, namespace in sorted(namespaces):
            client.forget(namespace)
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        made.progress = {**made.progress, "namespaces": sorted([one, name] for one, name in namespaces)}
        made.forgotten_at = session.scalar(select(func.now()))


def _finish(session: Session, made: ErasureRequest) -> None:
    made.subject = erasure.hashed(made.subject)
    made.state = "done"
    made.finished_at = session.scalar(select(func.clock_timestamp()))
    _step(made, "done")
    made.certificate = certify(session, made)
    # The chain is for ever: counts and hashes only.
    detail = {"certificate": made.certificate["hash"], "counts": made.certificate["rows"]}
    audit.record(session, "erasure", "erasure.done", f"erasure:{made.id}", detail)
