"""A gateway over the fake engine for most tests, and one over the real engine with random weights."""

from collections.abc import Iterator

import pytest

from services.platform.postgres import PostgresServer
from tests.gateway.parts import World, make_world


@pytest.fixture(scope="session")
def world(postgres: PostgresServer) -> Iterator[World]:
    """Gateway and shipper over the fake engine, shared: tests leave its projects and keys as they found them."""
    with make_world(postgres) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        yield made


@pytest.fixture(scope="session")
def real_world(postgres: PostgresServer) -> Iterator[World]:
    """The same over the real engine."""
    with make_world(postgres, real_engine=True) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        yield made
