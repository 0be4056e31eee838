"""How Alembic connects: one migration at a time, never waiting long on a lock that the running release holds."""

import re

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

import services.store.models  # noqa: F401 - fills Base.metadata
from services.settings import Settings
from services.store.base import Base

LOCK_TIMEOUT = "5s"
# Any constant will do; two processes that migrate at once take turns on it.
ADVISORY_LOCK = 0x57686574


PARTITION = re.compile(r"interaction(_body)?_\d{4}_\d\d(_\d\d)?")


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Leave out partition children, which `services.store.partitions` makes and retention drops."""
    return not (kind == "table" and PARTITION.fullmatch(name or ""))


def run(connection: Connection) -> None:
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
    connection.commit()
    try:
        context.configure(
            connection=connection, target_metadata=Base.metadata, include_name=include_name, compare_type=True
        )
        with context.begin_transaction():
            context.run_migrations()
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": ADVISORY_LOCK})
        connection.commit()


def main() -> None:
    url = context.config.attributes.get("database_url") or Settings().database_dsn
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        run(connection)
    engine.dispose()


main()
