"""The large world in small: whole, findable, the same again, and not filled twice; the table says what was missed."""

import pytest
from rich.progress import Progress
from sqlalchemy import func, select

from benchmarks import review, review_world
from benchmarks.review_cells import summary
from services.store import search
from services.store.base import Base, Sessions
from services.store.models import InteractionBody, Project
from services.store.search import Search

TABLES = ("interaction", "interaction_body", "review_item", "annotation", "feedback", "interaction_embedding")


def counts(sessions: Sessions) -> dict[str, int]:
    with sessions() as session:
        return {
            name: session.scalar(select(func.count()).select_from(Base.metadata.tables[name])) or 0 for name in TABLES
        }


def fill(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_world, "VARIETY", {"chat": 60, "entities": 20, "match": 20})
    with Progress(disable=True) as progress:
        review_world.fill(sessions, interactions=600, review_items=200, seed=3, progress=progress)


def test_a_world_is_whole_and_is_not_filled_twice(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(sessions, monkeypatch)
    first = counts(sessions)
    assert first["interaction"] == first["interaction_body"] == 600
    assert 140 < first["review_item"] < 260
    assert first["annotation"] > 0
    assert first["feedback"] > 0
    assert first["interaction_embedding"] > 500
    fill(sessions, monkeypatch)
    assert counts(sessions) == first
    with sessions() as session:
        project = session.scalars(select(Project).where(Project.slug == "chat")).one()
        output = session.scalars(
            select(InteractionBody.output).where(InteractionBody.project_id == project.id).limit(1)
        ).one()
        words = " ".join(word for word in output.split()[:4] if word.isalnum())
        assert search.newest(session, project.id, Search(words=words)).ids


def test_the_table_says_what_was_reached_and_what_was_missed() -> None:
    cells = {
        "search_words": summary([100.0] * 19 + [900.0]) | {"commit": "abc"},
        "submit": summary([200.0] * 9) | {"commit": "abc"},
        "build": {"seconds": 12.5, "examples": 49_000, "commit": "abc"},
    }
    setting = {"cpus": 2, "cpu": "a processor", "measured": "2026-11-30T", "rows": {"interaction": 10}, "command": "it"}
    text = review.render(setting, cells)
    assert "| interactions, first page by words | ≤ 300 ms | p95 **140 ms**, median 100 ms, 20 times | ✓ |" in text
    assert (
        "| submit acknowledged, 8 reviewers at once | ≤ 150 ms | p95 **200 ms**, median 200 ms, 9 times | missed |"
        in text
    )
    assert "| ≤ 60 s | **12.5 s**, 49,000 examples kept | ✓ |" in text
    assert "queue page" not in text
