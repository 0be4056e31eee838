"""The log of what was served: reading it, and landing spooled records in it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store.models import Interaction, InteractionBody

NARROW = tuple(column.name for column in Interaction.__table__.columns)
# The document is the database's own to make.
WIDE = tuple(column.name for column in InteractionBody.__table__.columns if column.name != "document")
DOCUMENTS = frozenset(
    column.name
    for table in (Interaction.__table__, InteractionBody.__table__)
    for column in table.columns
    if column.type.__class__.__name__ == "JSONB"
)
# Documents that may be absent: SQL's NULL then, never JSON's.
OPTIONAL = frozenset(column.name for column in Interaction.__table__.columns if column.nullable)


class Logged(NamedTuple):
    """Both halves of an interaction. `body` is None once its own, shorter retention has passed."""

    interaction: Interaction
    body: InteractionBody | None


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What a list of interactions is narrowed to; None leaves a field alone."""

    origin: str | None = None
    finish_reason: str | None = None
    adapter_digest: str | None = None
    end_user: str | None = None
    session_key: str | None = None


def get(session: Session, project_id: UUID, interaction_id: UUID) -> Logged:
    """One interaction of a project. Raises NotFound."""
    row = session.execute(_joined().where(Interaction.id == interaction_id)).one_or_none()
    if row is None or row[0].project_id != project_id:
        raise NotFound(f"there is no interaction {interaction_id} in this project")
    return Logged(row[0], row[1])


def get_many(session: Session, ids: Sequence[UUID]) -> dict[UUID, Logged]:
    """Those of `ids` that have landed."""
    rows = session.execute(_joined().where(Interaction.id.in_(ids))).all()
    return {row[0].id: Logged(row[0], row[1]) for row in rows}


def page(
    session: Session, project_id: UUID, *, before: UUID | None = None, limit: int = 50, only: Filter | None = None
) -> list[Logged]:
    """A project's newest interactions older than `before`, for paging by the last id seen."""
    query = _joined().where(Interaction.project_id == project_id)
    if before is not None:
        query = query.where(Interaction.id < before)
    for name, value in vars(only or Filter()).items():
        if value is not None:
            query = query.where(getattr(Interaction, name) == value)
    return [Logged(row[0], row[1]) for row in session.execute(query.order_by(Interaction.id.desc()).limit(limit))]


def _joined() -> Select[Interaction, InteractionBody]:
    return select(Interaction, InteractionBody).outerjoin(InteractionBody, InteractionBody.id == Interaction.id)


def land(connection: psycopg.Connection[Any], records: Sequence[dict[str, Any]]) -> int:
    """COPY records (column name to value, both halves in one dict) into the log; known ids are left as they are.

    Runs inside the caller's transaction. Returns how many were new. Any bad row fails the whole call.
    """
    with connection.cursor() as cursor:
        fresh = _land_table(cursor, "interaction", NARROW, records)
        _land_table(cursor, "interaction_body", WIDE, records)
    return fresh


def _land_table(
    cursor: psycopg.Cursor[Any], table: str, columns: Sequence[str], records: Sequence[dict[str, Any]]
) -> int:
    listed = ", ".join(columns)
    cursor.execute(
        f"CREATE TEMP TABLE IF NOT EXISTS landing_{table} (LIKE {table} INCLUDING DEFAULTS) ON COMMIT DELETE ROWS"
    )
    cursor.execute(f"TRUNCATE landing_{table}")
    with cursor.copy(f"COPY landing_{table} ({listed}) FROM STDIN") as copy:
        for record in records:
            copy.write_row([_field(name, record[name]) for name in columns])
    cursor.execute(f"INSERT INTO {table} ({listed}) SELECT {listed} FROM landing_{table} ON CONFLICT DO NOTHING")
    return cursor.rowcount


def _field(name: str, value: object) -> object:
    """Text form of documents, so that one that is no JSON fails in Postgres and not as a mistyped column."""
    if name not in DOCUMENTS or (value is None and name in OPTIONAL):
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
