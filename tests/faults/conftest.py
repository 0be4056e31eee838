"""Worlds to break: a gateway's home with a nursery that restarts its processes quickly."""

from collections.abc import Iterator

import pytest

from services.platform.postgres import PostgresServer
from tests.faults.nursery import Nursery, kill
from tests.gateway.parts import World, make_world


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts processes quickly."""
    with Nursery() as made:
        yield made


@pytest.fixture
def still(postgres: PostgresServer, nursery: Nursery) -> Iterator[World]:
    """A world in which nothing runs."""
    with make_world(postgres, step_ms=2) as world:
        yield world
        for pid in nursery.children_of(world):
            kill(pid)


@pytest.fixture
def doomed(still: World) -> World:
    """A world with nothing but the fake engine running."""
    still.start_engine()
    return still
