"""Worlds to break: a gateway's home with a nursery that restarts its processes quickly."""

from collections.abc import Iterator

import pytest

from services.platform.postgres import PostgresServer
from tests.faults.nursery import Nursery
from tests.gateway.parts import World, make_world


@pytest.fixture
def doomed(postgres: PostgresServer) -> Iterator[World]:
    """A world with nothing but the fake engine running."""
    with make_world(postgres, step_ms=2) as world:
        world.start_engine()
        yield world


@pytest.fixture
def nursery(doomed: World) -> Iterator[Nursery]:
    """Starts the doomed world's processes."""
    with Nursery(doomed.environment, doomed.settings.home / "logs") as made:
        yield made
