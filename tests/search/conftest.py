"""The console and its people, as the console's own tests have them, and a meaning without an engine."""

import pytest

from services.errors import Unavailable
from services.store.base import Sessions
from services.store.models import Project
from services.store.search import Meaning
from tests.console import seed
from tests.console.conftest import (  # noqa: F401 - fixtures
    SignIn,
    console_settings,
    project,
    sign_in,
)

MODEL = "m/mean"


class FakeEmbedder:
    """Says what it was told to say; away until told."""

    def __init__(self) -> None:
        self.vector: list[float] | None = None

    def embed(self, text: str, project_id: object) -> Meaning:
        if self.vector is None:
            raise Unavailable("the engine cannot be reached")
        return Meaning(self.vector, MODEL)

    def close(self) -> None:
        """Nothing to let go."""


@pytest.fixture
def other(sessions: Sessions) -> Project:
    with sessions.begin() as session:
        return seed.project(session, "other", "Other")
