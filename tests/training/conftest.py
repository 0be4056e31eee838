"""Fixtures of the training tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store.base import Sessions
from tests.curation.world import World, make_world
from tests.training.tiny import make_model


@pytest.fixture(scope="session")
def tiny_model() -> Iterator[Path]:
    """Directory of the tiny Llama."""
    root = Path(tempfile.mkdtemp(prefix="whet-tiny-"))
    yield make_model(root)
    shutil.rmtree(root)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    """The serving tokenizer of the tiny Llama."""
    return Tokenizer.load(tiny_model)


@pytest.fixture
def world(sessions: Sessions) -> World:
    """A project with two reviewers and nothing logged."""
    return make_world(sessions)


@pytest.fixture
def tiny_settings(settings: Settings, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose base is the tiny Llama."""
    monkeypatch.setenv("WHET_MODEL", str(tiny_model))
    return Settings()
