"""One gateway per test module, over the fake engine or the real one with random weights."""

from collections.abc import Iterator

import pytest

from services.platform.postgres import PostgresServer
from tests.gateway.parts import World, make_world


@pytest.fixture(scope="module")
def world(postgres: PostgresServer) -> Iterator[World]:
    """Gateway and shipper over the fake engine, shared by a module: tests leave its projects as they found them."""
    with make_world(postgres) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        yield made


@pytest.fixture(scope="module")
def real_world(postgres: PostgresServer) -> Iterator[World]:
    """The same over the real engine."""
    with make_world(postgres, real_engine=True) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        yield made
