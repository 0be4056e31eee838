"""The "erase" job: takes a subject out of the spools, the tables, revisions, files and the engine, then certifies it.

Any number of attempts, killed anywhere, leave the same: each step finds what is still there, and counts add up in the
request's own row, in the transaction of what they count.

Others work meanwhile. A build, a judgement, a training may have read a text before it was erased, and write it after.
So runs that read are stopped, whoever had read is waited for, and all of it is erased once more.
"""

import time
from collections.abc import Callable
from uuid import UUID

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from engine.sync_client import SyncEngineClient
from services.settings import Settings
from services.store import audit, erasure, erasure_rows, erasure_spools, erasure_traces
from services.store.certificate import certify
from services.store.erasure_cover import Subject, hashed
from services.store.failpoints import reach
from services.store.jobs import JobCancelled, Lease
from services.store.models import ErasureRequest, LogSpool
from worker.erasure import files, learned, progress

CONNECT_SECONDS = 30.0
BATCH = 200
# The longest answers still being given, a shipper that is being restarted, a training that unwinds, a long build.
WAIT_SECONDS = 300.0
POLL_SECONDS = 0.2

log = structlog.get_logger()


def erase_job(lease: Lease, settings: Settings) -> None:
    """Handler of "erase". Raises RuntimeError for what it waited for in vain; another attempt goes on."""
    request_id = UUID(lease.payload["request_id"])
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        if made.state == "done":
            return
        made.state = "running"
    reach("erase.begun")
    _wait_for_spools(lease, request_id)
    reach("erase.shipped")
    _erase_tables(lease, request_id)
    reach("erase.emptied")
    _erase_again(lease, request_id)
    reach("erase.swept")
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        _follow_up(session, made)
        progress.step(made, "cleaning files")
    reach("erase.rebuilt")
    files.clean(lease, request_id, settings)
    reach("erase.cleaned")
    _forget(lease, request_id, settings)
    reach("erase.forgotten")
    with lease.transaction() as session:
        _finish(session, erasure.get(session, request_id))
        lease.succeed(session)
    reach("erase.certified")
    log.info("erasure done", request=str(request_id))


def _wait(lease: Lease, missing: Callable[[Session], str | None]) -> None:
    """Until nothing is missing. Raises RuntimeError with what still is, JobCancelled."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with lease.sessions() as session:
            said = missing(session)
        if said is None:
            return
        if lease.cancelled():
            raise JobCancelled
        if time.monotonic() > deadline:
            raise RuntimeError(said)
        time.sleep(POLL_SECONDS)


# --- the spools -------------------------------------------------------------------------------------------


def _wait_for_spools(lease: Lease, request_id: UUID) -> None:
    """Tables come after the spools: what a shipper still has to recognise, it recognises by them."""
    with lease.transaction() as session:
        progress.step(erasure.get(session, request_id), "waiting for the log to be shipped")
    _wait(lease, lambda session: _unclean(session, request_id))
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        made.spool_clean_at = made.spool_clean_at or erasure_rows.moment(session)


def _unclean(session: Session, request_id: UUID) -> str | None:
    waiting = erasure_spools.unclean(session, request_id)
    if waiting:
        gone = f"if its disk is gone, `whet spool forget {waiting[0].id}`"
        return f"the shipper of {_told(waiting[0])} has not cleaned its log spool: start it, or, {gone}"
    if not erasure_spools.any_clean(session, request_id):
        return "no shipper has cleaned its log spool: is one running? (`whet doctor` says)"
    return None


def _told(spool: LogSpool) -> str:
    return f"{spool.host}:{spool.path}, last seen {spool.seen_at:%Y-%m-%d %H:%M} UTC,"


# --- the tables -------------------------------------------------------------------------------------------


def _erase_tables(lease: Lease, request_id: UUID) -> None:
    """Page by page, until there is nothing left that the subject asked, was imported for, or said."""
    while _erase_page(lease, request_id):
        reach("erase.page")
        if lease.cancelled():
            raise JobCancelled
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        progress.count(made, {"feedback": erasure_rows.erase_said(session, made)})


def _erase_page(lease: Lease, request_id: UUID) -> bool:
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        ids = erasure_rows.next_interactions(session, made, BATCH)
        imported = [] if ids else erasure_rows.imported(session, Subject.of(made), made.created_at, BATCH)
        if not ids and not imported:
            return False
        progress.note_traffic(session, made, ids)
        progress.count(made, erasure_rows.erase(session, made, ids, imported))
        progress.step(made, f"erased {made.progress['counts'].get('interaction', 0)} interactions")
        return True


def _erase_again(lease: Lease, request_id: UUID) -> None:
    """Until no run was stopped: what one of them wrote down before it ended is erased after it has."""
    stopped_any = True
    while stopped_any:
        with lease.transaction() as session:
            made = erasure.get(session, request_id)
            stopped_any = learned.stop_runs(session, made)
            progress.step(made, "waiting for work that had read it")
        reach("erase.stopped")
        _wait(lease, lambda session: learned.unfinished(session, erasure.get(session, request_id)))
        with lease.sessions() as session:
            since = erasure_rows.moment(session)
        _wait(lease, lambda session: erasure_rows.older_transaction(session, since))  # noqa: B023 - called right here
        _sweep(lease, request_id)


def _sweep(lease: Lease, request_id: UUID) -> None:
    with lease.sessions() as session:
        pages = list(erasure_rows.noted_pages(session, erasure.get(session, request_id), BATCH))
    for page in pages:
        with lease.transaction() as session:
            made = erasure.get(session, request_id)
            progress.count(made, erasure_rows.erase(session, made, page["interaction"], page["example"]))


def _follow_up(session: Session, made: ErasureRequest) -> None:
    """Traces elsewhere are emptied, revisions rebuilt without the rows, artefacts that learned them marked."""
    projects = progress.projects(session, made)
    progress.count(
        made,
        {
            "job": erasure_traces.forget_quotes(session, projects, made.created_at),
            "prompts_that_showed_an_example": erasure_traces.forget_shown(session, made),
            "typed_by_people": erasure_traces.forget_typed(session, made, projects),
        },
    )
    progress.add(made, "exports", learned.exported(session, made, projects))
    progress.add(made, "revisions", learned.rebuild(session, made))
    progress.add(made, "tainted", learned.taint(session, made, projects))


# --- the engine, and the end ------------------------------------------------------------------------------


def _forget(lease: Lease, request_id: UUID, settings: Settings) -> None:
    """Suffix corpora and cached KV of the namespaces; the dispatcher fills the corpora again with what is left."""
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        progress.step(made, "forgetting in the engine")
        namespaces = {(str(one), one.hex) for one in progress.projects(session, made)}
        namespaces |= {(project, name) for project, name in made.progress.get("namespaces", [])}
    with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
        for _, namespace in sorted(namespaces):
            client.forget(namespace)
    with lease.transaction() as session:
        made = erasure.get(session, request_id)
        made.progress = {**made.progress, "namespaces": sorted([one, name] for one, name in namespaces)}
        made.forgotten_at = session.scalar(select(func.now()))


def _finish(session: Session, made: ErasureRequest) -> None:
    made.subject = hashed(made.subject)
    made.state = "done"
    made.finished_at = erasure_rows.moment(session)
    progress.step(made, "done")
    made.certificate = certify(session, made)
    erasure_rows.forget_notes(session, made)
    # The chain is for ever: counts and hashes only.
    detail = {"certificate": made.certificate["hash"], "counts": made.certificate["rows"]}
    audit.record(session, "erasure", "erasure.done", f"erasure:{made.id}", detail)
