"""Taking an erasure's rows out of the tables, and out once more: what was written meanwhile by whoever had read them.

Every row that was erased is noted (`erased_row`) until the erasure is done. When all transactions that could have seen
its text have ended, `erase` runs over the notes again; it touches only what is not erased yet, so its counts add up.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.store.erasure_cover import Subject, asked_by
from services.store.erasure_places import PLACES, By, Emptied, Gone
from services.store.examples import ERASED
from services.store.models import ErasedRow, ErasureRequest, Example, Feedback, Interaction, ReviewItem

Ids = Mapping[By, Sequence[UUID]]


def preview(session: Session, subject: Subject) -> dict[str, int]:
    """Rows by table that an erasure would delete or empty now."""
    now = func.now()
    interactions = list(session.scalars(select(Interaction.id).where(*asked_by(subject, now))))
    ids: Ids = {
        "interaction": interactions,
        "example": [*_examples_of(session, interactions, anew=True), *imported(session, subject, now)],
    }
    return {
        table: session.scalar(text(f"SELECT count(*) FROM {table} WHERE {key} = ANY(:ids)"), {"ids": ids[by]}) or 0
        for table, (key, by) in _existing(columns(session)).items()
    }


def next_interactions(session: Session, made: ErasureRequest, limit: int) -> list[UUID]:
    """Interactions still to erase: those in the log, then those whose log has passed its retention."""
    subject = Subject.of(made)
    found = list(session.scalars(select(Interaction.id).where(*asked_by(subject, made.created_at)).limit(limit)))
    return found or _left_behind(session, subject, made.created_at, limit)


def _left_behind(session: Session, subject: Subject, until: datetime, limit: int) -> list[UUID]:
    """By the group, which is the subject's name where the app gave no other. A group of a living log may be anybody's,
    so only rows without one count."""
    found: list[UUID] = []
    for model in (ReviewItem, Example):
        logged = select(Interaction.id).where(Interaction.id == model.interaction_id).exists()
        query = select(model.interaction_id).where(
            model.group_key == subject.name, model.interaction_id.is_not(None), model.created_at <= until, ~logged
        )
        if subject.project_id is not None:
            query = query.where(model.project_id == subject.project_id)
        found += [one for one in session.scalars(query.limit(limit)) if one is not None]
    return list(dict.fromkeys(found))


def imported(session: Session, subject: Subject, until: Any, limit: int | None = None) -> list[UUID]:  # noqa: ANN401
    """Imported examples whose file named the subject as their group, still to erase; no interaction leads to them."""
    query = select(Example.id).where(
        Example.interaction_id.is_(None), Example.group_key == subject.name, Example.created_at <= until,
        ~Example.content_hash.startswith(ERASED),
    )  # fmt: skip
    if subject.project_id is not None:
        query = query.where(Example.project_id == subject.project_id)
    return list(session.scalars(query.limit(limit)))


# --- erasing ----------------------------------------------------------------------------------------------


def erase(
    session: Session, made: ErasureRequest, interaction_ids: Collection[UUID], example_ids: Collection[UUID] = ()
) -> Counter[str]:
    """Take these interactions, everything made of them, and these examples out of the tables, and note them.

    Returns the rows deleted or emptied, by table; those that were so before are not counted again.
    """
    # A judgement or an undo holds its item's lock: it has pinned its answer before this, or finds nothing to pin.
    items = select(ReviewItem.id).where(ReviewItem.interaction_id.in_(interaction_ids)).order_by(ReviewItem.id)
    session.execute(items.with_for_update())
    examples = {*example_ids, *_examples_of(session, interaction_ids)}
    ids: Ids = {"interaction": list(interaction_ids), "example": sorted(examples)}
    _note(session, made, ids)
    there = columns(session)
    counts: Counter[str] = Counter()
    session.execute(text("SET LOCAL whet.erasing = 'on'"))
    for table, (key, by) in _existing(there).items():
        if ids[by]:
            done = session.execute(text(_statement(table, key, there[table])), {"ids": ids[by]})
            counts[table] += done.rowcount  # type: ignore[attr-defined]
    session.execute(text("SET LOCAL whet.erasing = 'off'"))
    return counts


def _examples_of(session: Session, interaction_ids: Collection[UUID], *, anew: bool = False) -> list[UUID]:
    """With `anew` only those that no erasure has emptied."""
    query = select(Example.id).where(Example.interaction_id.in_(interaction_ids))
    return list(session.scalars(query.where(~Example.content_hash.startswith(ERASED)) if anew else query))


def _note(session: Session, made: ErasureRequest, ids: Ids) -> None:
    rows = [{"request_id": made.id, "kind": kind, "row_id": one} for kind in ids for one in ids[kind]]
    if rows:
        session.execute(insert(ErasedRow).on_conflict_do_nothing(), rows)


def noted(made: ErasureRequest, kind: Literal["interaction", "example"]) -> Any:  # noqa: ANN401 - a subquery
    """Ids that this request has erased."""
    return select(ErasedRow.row_id).where(ErasedRow.request_id == made.id, ErasedRow.kind == kind)


def noted_pages(session: Session, made: ErasureRequest, size: int) -> Iterator[Ids]:
    """All that was noted, page by page."""
    for kind in ("interaction", "example"):
        ids = session.scalars(noted(made, kind).order_by(ErasedRow.row_id)).all()
        for start in range(0, len(ids), size):
            page = list(ids[start : start + size])
            yield {
                "interaction": page if kind == "interaction" else [],
                "example": page if kind == "example" else [],
            }


def forget_notes(session: Session, made: ErasureRequest) -> None:
    """The erasure is done."""
    session.execute(delete(ErasedRow).where(ErasedRow.request_id == made.id))


def erase_said(session: Session, made: ErasureRequest) -> int:
    """Feedback that the subject wrote about anybody's answer; returns how many rows."""
    if made.kind != "end_user":
        return 0
    mine = [Feedback.author == made.subject, Feedback.created_at <= made.created_at]
    if made.project_id is not None:
        mine.append(Feedback.project_id == made.project_id)
    return len(session.scalars(delete(Feedback).where(*mine).returning(Feedback.id)).all())


def _statement(table: str, key: str, there: Collection[str]) -> str:
    """Names come from the registry, never from outside."""
    place = PLACES[table]
    if isinstance(place, Gone):
        return f"DELETE FROM {table} WHERE {key} = ANY(:ids)"
    assert isinstance(place, Emptied)
    changes = {name: value for name, value in place.to.items() if name in there}
    listed = ", ".join(f'"{name}" = {value}' for name, value in changes.items())
    differing = " OR ".join(f'"{name}" IS DISTINCT FROM {value}' for name, value in changes.items())
    return f"UPDATE {table} SET {listed} WHERE {key} = ANY(:ids) AND ({differing})"


def _existing(there: Mapping[str, Collection[str]]) -> dict[str, tuple[str, By]]:
    """The registry's tables that this database has, in its order: key column and what the key names."""
    return {
        table: (next(name for name in place.key if name in there[table]), place.by)
        for table, place in PLACES.items()
        if table in there and isinstance(place, Gone | Emptied)
    }


def columns(session: Session) -> dict[str, set[str]]:
    """Column names by table."""
    rows = session.execute(
        text("SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'")
    )
    found: dict[str, set[str]] = {}
    for table, column in rows:
        found.setdefault(table, set()).add(column)
    return found


# --- who may still have read them -------------------------------------------------------------------------


def moment(session: Session) -> datetime:
    """Now, by the database's clock."""
    found: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return found


def older_transaction(session: Session, since: datetime) -> str | None:
    """A transaction that began before `since` and is not over, in words; None when there is none.

    Such a one may have read what was erased by then, and write of it what was not there to be erased.
    """
    found = session.execute(
        text(
            "SELECT pid, application_name, xact_start FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND xact_start < :since "
            "ORDER BY xact_start LIMIT 1"
        ),
        {"since": since},
    ).one_or_none()
    if found is None:
        return None
    name = found.application_name or "unnamed"
    return f"a transaction of process {found.pid} ({name}), open since {found.xact_start:%H:%M:%S}"
