"""Names and places by Presidio, against a module that stands in for it: it is no dependency of the tests."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from services.errors import Unprocessable
from services.store import pii, pii_presidio, projects, revisions
from services.store.pii import Found
from tests.curation.world import World
from worker.curation.build import build_revision

NAMES = {"Ada Lovelace": "PERSON", "Oslo": "LOCATION", "ada@example.com": "PERSON", "May": "DATE_TIME"}


class Analyzer:
    """As much of `AnalyzerEngine` as is used, with Presidio's own names for arguments and results."""

    def analyze(self, *, text: str, language: str, entities: list[str]) -> list[Any]:
        assert language == "en"
        assert set(entities) == {"PERSON", "LOCATION"}
        return [
            SimpleNamespace(entity_type=kind, start=text.index(name), end=text.index(name) + len(name), score=score)
            for name, kind in NAMES.items()
            for score in ((0.85, 0.2) if name == "Oslo" else (0.85,))
            if name in text
        ]


@pytest.fixture
def presidio(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("presidio_analyzer")
    module.__spec__ = ModuleSpec("presidio_analyzer", None)
    module.AnalyzerEngine = Analyzer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "presidio_analyzer", module)
    pii_presidio._analyzer.cache_clear()
    yield
    pii_presidio._analyzer.cache_clear()


def test_names_are_found_beside_patterns_and_patterns_win(presidio: None) -> None:
    text = "Ada Lovelace (ada@example.com) of Oslo, in May"
    assert pii_presidio.find(text) == [Found("name", 0, 12), Found("email", 14, 29), Found("place", 34, 38)]
    masked = pii.treat(text, "mask", pii_presidio.find)
    assert masked == ("[NAME] ([EMAIL]) of [PLACE], in May", ("email", "name", "place"))
    assert pii_presidio.find("  ") == []


def test_a_project_that_asks_for_names_gets_them_masked_in_its_revisions(presidio: None, world: World) -> None:
    world.configure(pii="mask", pii_names=True)
    world.corrected("who is Ada Lovelace of Oslo", "nobody", "Ada Lovelace, a mathematician")
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        [member] = revisions.members(session, revision.id)
        rebuilt = revisions.rebuild(session, revision.id)
    assert member.example.messages == [{"role": "user", "content": "who is [NAME] of [PLACE]"}]
    assert member.example.completion == "[NAME], a mathematician"
    assert revision.report["pii"]["kinds"] == {"name": 1, "place": 1}
    assert (rebuilt.digest, rebuilt.changed) == (revision.digest, [])


def test_without_presidio_a_build_that_needs_it_is_refused_in_a_sentence(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pii_presidio, "find_spec", lambda _: None)
    with world.sessions.begin() as session:
        projects.configure(session, world.project(session), {"pii_names": True})
    world.corrected("who is Ada Lovelace", "nobody", "a mathematician")
    with world.sessions.begin() as session, pytest.raises(Unprocessable, match=r"pip install 'whet\[pii\]'"):
        build_revision(session, world.project_id, "golden")
    assert pii_presidio.finder_of({"pii_names": True, "pii": "off"}) is pii.find
