"""Bring a database to a revision: `python -m migrations.run [upgrade|downgrade] [revision]`."""

import sys
from pathlib import Path

from alembic import command
from alembic.config import Config

from services.settings import Settings


def configuration(database_url: str) -> Config:
    """Alembic's configuration without an ini file, so that it works from an installed package too."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Apply every migration up to `revision`."""
    command.upgrade(configuration(database_url), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Undo migrations down to `revision` (`base` for all)."""
    command.downgrade(configuration(database_url), revision)


def main() -> None:
    direction, revision = (*sys.argv[1:], *("upgrade", "head")[len(sys.argv) - 1 :])[:2]
    if direction not in {"upgrade", "downgrade"}:
        sys.exit(f"unknown direction {direction!r}: upgrade or downgrade")
    (upgrade if direction == "upgrade" else downgrade)(Settings().database_dsn, revision)


if __name__ == "__main__":
    main()
