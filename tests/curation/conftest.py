"""Fixtures of the curation tests."""

import pytest

from services.store.base import Sessions
from tests.curation.world import World, make_world


@pytest.fixture
def world(sessions: Sessions) -> World:
    """A project with two reviewers and nothing logged."""
    return make_world(sessions)
