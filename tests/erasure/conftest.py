"""A world in which somebody's words are everywhere: spool, tables, files, and next to them somebody else's."""

from collections.abc import Iterator

import pytest

from services.platform.postgres import PostgresServer
from tests.gateway.parts import World, make_world


@pytest.fixture(scope="module")
def world(postgres: PostgresServer) -> Iterator[World]:
    with make_world(postgres) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        yield made
