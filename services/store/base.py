"""The declarative base, column vocabulary, UUIDv7, and the session factory."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, Engine, MetaData, Text, create_engine, func
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID
from sqlalchemy.orm import DeclarativeBase, Session, mapped_column, sessionmaker

CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """All tables. Text for strings, JSONB for documents, timestamps always with a zone."""

    metadata = MetaData(naming_convention=CONVENTION)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own protocol
        str: Text,
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
        list[str]: ARRAY(Text),
        datetime: DateTime(timezone=True),
        uuid.UUID: UUID(as_uuid=True),
        int: BigInteger,
    }


def uuid7(at: float | None = None) -> uuid.UUID:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then randomness. `at` is seconds since the epoch."""
    milliseconds = int((time.time() if at is None else at) * 1000)
    value = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return uuid.UUID(int=value)


def uuid7_time(value: uuid.UUID) -> datetime:
    """When a UUIDv7 was made (millisecond resolution). Raises ValueError for any other UUID."""
    if value.version != 7:
        raise ValueError(f"{value} is not a UUIDv7")
    return datetime.fromtimestamp((value.int >> 80) / 1000, UTC)


def one_of(column: str, *values: str) -> CheckConstraint:
    """Text limited to a vocabulary; a CHECK is easier to migrate than a Postgres ENUM."""
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


Key = Annotated[uuid.UUID, mapped_column(primary_key=True, default=uuid7)]
Now = Annotated[datetime, mapped_column(server_default=func.now())]


def make_engine(dsn: str, *, pool_size: int = 5) -> Engine:
    """An engine whose connections are checked before use, so a restarted Postgres costs no failed request.

    Its errors do not quote what was sent: they end in logs, which outlive erasures.
    """
    return create_engine(
        dsn,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=5,
        connect_args={"connect_timeout": 5},
    )


Sessions = sessionmaker[Session]


def make_sessions(dsn: str, *, pool_size: int = 5) -> Sessions:
    """`with sessions.begin() as session:` is one transaction; helpers below flush, they never commit."""
    return sessionmaker(make_engine(dsn, pool_size=pool_size), expire_on_commit=False)


@contextmanager
def transaction(sessions: Sessions) -> Iterator[Session]:
    """One transaction, committed on success and rolled back on any error."""
    with sessions.begin() as session:
        yield session
