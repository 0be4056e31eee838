"""Which log spools there are, and which of them hold an erasure's subject no more.

Every shipper registers the spool it reads. An erasure waits for all of them: one that is silent holds it up, because
its disk may hold the subject, until its shipper is back or somebody says that the spool is gone.
"""

import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import audit
from services.store.erasure_cover import Rule
from services.store.models import ErasureRequest, ErasureSpool, LogSpool

ID_NAME = "spool.id"
UNFINISHED = ("queued", "running")
# A shipper registers more often than this.
SILENT = timedelta(minutes=2)


def id_of(spool: Path) -> UUID:
    """The spool's own id, made when it is first asked for. Only the shipper that holds the spool's lock may ask."""
    path = spool / ID_NAME
    if not path.exists():
        draft = path.with_suffix(".draft")
        draft.write_text(str(uuid4()))
        draft.chmod(0o600)
        draft.rename(path)
    return UUID(path.read_text().strip())


def register(session: Session, spool_id: UUID, spool: Path) -> None:
    """The shipper is there. A spool at the same place with another id was deleted, and is forgotten."""
    host, path = socket.gethostname(), str(spool)
    session.execute(delete(LogSpool).where(LogSpool.host == host, LogSpool.path == path, LogSpool.id != spool_id))
    made = insert(LogSpool).values(id=spool_id, host=host, path=path)
    seen = {"host": host, "path": path, "seen_at": func.now()}
    session.execute(made.on_conflict_do_update(index_elements=["id"], set_=seen))


def open_for(session: Session, spool_id: UUID, settled: timedelta) -> list[Rule]:
    """Unfinished requests, older than `settled`, for which this spool has not been cleaned."""
    done = select(ErasureSpool.request_id).where(ErasureSpool.spool_id == spool_id)
    waiting = select(ErasureRequest).where(
        ErasureRequest.state.in_(UNFINISHED), ErasureRequest.created_at < func.now() - settled,
        ErasureRequest.id.not_in(done),
    )  # fmt: skip
    return [Rule.of(one) for one in session.scalars(waiting)]


def cleaned(session: Session, request_id: UUID, spool_id: UUID, records: int) -> None:
    """The spool holds nothing of the request's subject any more; `records` were overwritten or removed."""
    made = insert(ErasureSpool).values(request_id=request_id, spool_id=spool_id, records=records)
    session.execute(made.on_conflict_do_nothing())
    count = ErasureRequest.spool_records + records
    session.execute(update(ErasureRequest).where(ErasureRequest.id == request_id).values(spool_records=count))


def list_(session: Session) -> Sequence[LogSpool]:
    """All that are registered, the longest silent first."""
    return session.scalars(select(LogSpool).order_by(LogSpool.seen_at, LogSpool.id)).all()


def unclean(session: Session, request_id: UUID) -> Sequence[LogSpool]:
    """Those that have not said yet that they are clean, the longest silent first."""
    done = select(ErasureSpool.spool_id).where(ErasureSpool.request_id == request_id)
    return session.scalars(select(LogSpool).where(LogSpool.id.not_in(done)).order_by(LogSpool.seen_at)).all()


def any_clean(session: Session, request_id: UUID) -> bool:
    """Whether any spool has answered: before the first shipper has registered there is nobody to wait for by name."""
    return (
        session.scalar(select(ErasureSpool.spool_id).where(ErasureSpool.request_id == request_id).limit(1)) is not None
    )


def forget(session: Session, spool_id: UUID, actor: str) -> LogSpool:
    """Somebody's word that a spool's disk is gone: erasures wait for it no more.

    Raises NotFound; Conflict while its shipper is alive.
    """
    query = select(LogSpool, LogSpool.seen_at > func.now() - SILENT).where(LogSpool.id == spool_id)
    found = session.execute(query.with_for_update()).one_or_none()
    if found is None:
        raise NotFound(f"there is no spool {spool_id}")
    spool, alive = found
    if alive:
        raise Conflict("this spool's shipper is running; stop it first, if the spool is to be given up")
    session.delete(spool)
    session.flush()
    audit.record(session, actor, "spool.forget", f"spool:{spool_id}", {"host": spool.host, "path": spool.path})
    return spool
