"""Many rows at once by COPY, inside the session's own transaction."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, cast

import psycopg
from sqlalchemy import ColumnElement, Table, any_, literal
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import InstrumentedAttribute, Session


def among(column: InstrumentedAttribute[Any], values: Sequence[object]) -> ColumnElement[bool]:
    """`column IN (values)` as one parameter: a statement has room for 65,535 of them."""
    return column == any_(literal(list(values), ARRAY(column.type)))


def copy_rows(session: Session, table: Table, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Append rows; one that the table refuses fails them all."""
    _copy(session, table.name, table, columns, rows)


def land_rows(session: Session, table: Table, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Put rows into a temporary table like `table`, empty before and gone with the transaction; its name."""
    name = f"landing_{table.name}"
    with _connection(session).cursor() as cursor:
        cursor.execute(f"CREATE TEMP TABLE IF NOT EXISTS {name} (LIKE {table.name} INCLUDING DEFAULTS) ON COMMIT DROP")
        cursor.execute(f"TRUNCATE {name}")
    _copy(session, name, table, columns, rows)
    return name


def _copy(session: Session, into: str, table: Table, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    listed = ", ".join(f'"{name}"' for name in columns)
    documents = [isinstance(table.c[name].type, JSONB) for name in columns]
    with (
        _connection(session).cursor() as cursor,
        cursor.copy(f"COPY {into} ({listed}) FROM STDIN") as copy,
    ):
        for row in rows:
            copy.write_row([_field(value, document) for value, document in zip(row, documents, strict=True)])


def _field(value: object, document: bool) -> object:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) if document and value is not None else value


def _connection(session: Session) -> psycopg.Connection[Any]:
    session.flush()
    return cast("psycopg.Connection[Any]", session.connection().connection.driver_connection)
