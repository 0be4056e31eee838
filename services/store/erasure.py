"""Erasing an end user or a session: asking for it, following it, taking it up again. `erasure_cover` says what it
covers, `erasure_rows` and `erasure_traces` take it out of the tables, the "erase" job does it all in order."""

from uuid import UUID

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store import audit, jobs
from services.store.base import uuid7
from services.store.erasure_cover import Subject, hashed
from services.store.models import ERASURE_KINDS, ErasureRequest, Job

JOB = "erase"
LONGEST_SUBJECT = 512
UNFINISHED = ("queued", "running")


def checked(project_id: UUID | None, kind: str, name: str) -> Subject:
    """A subject as the log would hold it. Raises InvalidRequest."""
    if kind not in ERASURE_KINDS:
        raise InvalidRequest(f"erase an {' or a '.join(ERASURE_KINDS)}, not {kind!r}", param="kind")
    if not name or len(name) > LONGEST_SUBJECT or any("\ud800" <= one <= "\udfff" for one in name):
        raise InvalidRequest(f"name whom to erase, in 1 to {LONGEST_SUBJECT} characters", param="subject")
    return Subject(project_id, kind, name.replace("\0", "\ufffd"))


def request(session: Session, subject: Subject, asked_by: str) -> ErasureRequest:
    """Record the request and queue its job. Raises Conflict while the same one is unfinished."""
    same = select(ErasureRequest.id).where(
        ErasureRequest.state.in_(UNFINISHED), ErasureRequest.kind == subject.kind,
        ErasureRequest.subject == subject.name, ErasureRequest.project_id.is_not_distinct_from(subject.project_id),
    )  # fmt: skip
    if session.scalar(same.limit(1)) is not None:
        raise Conflict("this erasure is under way already")
    made = ErasureRequest(
        id=uuid7(), project_id=subject.project_id, kind=subject.kind, subject=subject.name, asked_by=asked_by
    )
    session.add(made)
    session.flush()
    session.refresh(made)
    _enqueue(session, made)
    detail = {"kind": subject.kind, "subject": hashed(subject.name)}
    audit.record(session, asked_by, "erasure.request", f"erasure:{made.id}", detail)
    return made


def _enqueue(session: Session, made: ErasureRequest) -> None:
    # Nobody may read the subject in the ledger: the job knows the request's id.
    payload, dedupe_key = {"request_id": str(made.id)}, f"{JOB}:{made.id}"
    job = jobs.enqueue(session, JOB, payload, project_id=made.project_id, dedupe_key=dedupe_key, priority=50)
    made.job_id, made.state = job.id, "queued"
    made.progress = {name: value for name, value in made.progress.items() if name != "error"}
    session.flush()


def again(session: Session, made: ErasureRequest) -> ErasureRequest:
    """Go on with one that failed; what it has done stays done. Raises Conflict for any other."""
    if made.state != "failed":
        raise Conflict(f"this erasure is {made.state}; only a failed one is taken up again")
    _enqueue(session, made)
    return made


def get(session: Session, request_id: UUID, project_id: UUID | None = None) -> ErasureRequest:
    """A request; with `project_id` only one of that project. Raises NotFound."""
    found = session.get(ErasureRequest, request_id, populate_existing=True)
    if found is None or project_id not in (None, found.project_id):
        raise NotFound(f"there is no erasure {request_id} here")
    return found


def list_(session: Session, project_id: UUID | None, *, limit: int = 50) -> list[ErasureRequest]:
    """Newest first; with `project_id` that project's and those of all projects."""
    query = select(ErasureRequest)
    if project_id is not None:
        query = query.where(or_(ErasureRequest.project_id == project_id, ErasureRequest.project_id.is_(None)))
    return list(session.scalars(query.order_by(ErasureRequest.id.desc()).limit(limit)))


def settle(session: Session) -> list[UUID]:
    """Requests whose job ended without finishing them have failed, and say why; returns them."""
    ended = (
        select(ErasureRequest, Job)
        .join(Job, Job.id == ErasureRequest.job_id)
        .where(ErasureRequest.state.in_(UNFINISHED), Job.state.in_(("failed", "cancelled", "dead")))
    )
    found = session.execute(ended.with_for_update(of=ErasureRequest, skip_locked=True)).all()
    for made, job in found:
        made.state = "failed"
        made.progress = {**made.progress, "error": job.error}
    session.flush()
    return [made.id for made, _ in found]
