"""Meaning ranks by nearness within the project and its model; both fuse; without an engine words still find."""

import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine.client import EngineGone
from engine.messages import Pooled
from services.settings import Settings
from services.store import embeddings, feedback, jobs, search
from services.store.base import Sessions, uuid7
from services.store.models import InteractionEmbedding, Job, Project
from services.store.search import Meaning, Search
from tests.console import seed
from tests.console.conftest import SignIn
from tests.search.conftest import MODEL, FakeEmbedder
from worker.indexing import embed
from worker.schedule import EMBED_PAUSE, Indexer


def with_vectors(sessions: Sessions, project: Project, vectors: dict[str, list[float]]) -> dict[str, UUID]:
    with sessions.begin() as session:
        made = {text: seed.interaction(session, project.id, output=text).id for text in vectors}
        embeddings.add(session, project.id, MODEL, {made[text]: vector for text, vector in vectors.items()})
    return made


def test_the_nearest_come_first_and_others_are_not_asked(sessions: Sessions, project: Project, other: Project) -> None:
    mine = with_vectors(sessions, project, {"east": [1, 0], "north": [0, 1], "between": [0.6, 0.8]})
    with_vectors(sessions, other, {"theirs": [1, 0]})
    with sessions.begin() as session:
        embeddings.add(session, project.id, "old/mean", {mine["north"]: [1, 0]})
        near = search.nearest(session, project.id, Search(words="x"), Meaning([1, 0], MODEL))
    assert near == [mine["east"], mine["between"]]
    with sessions() as session:
        assert search.nearest(session, project.id, Search(words="x", finish="error"), Meaning([1, 0], MODEL)) == []


def test_of_what_people_said_something_of_the_nearest_come_first(
    sessions: Sessions, project: Project, other: Project
) -> None:
    """Opinions come twice, of answers without a vector, of none that has landed, and in another project."""
    mine = with_vectors(sessions, project, {"east": [1, 0], "north": [0, 1], "between": [0.6, 0.8]})
    theirs = with_vectors(sessions, other, {"theirs": [1, 0]})
    with sessions.begin() as session:
        bare = seed.interaction(session, project.id, output="no vector")
        said = [(project, mine["north"]), (project, mine["between"]), (project, mine["between"]), (project, bare.id),
                (project, uuid7()), (other, theirs["theirs"])]  # fmt: skip
        for number, (owner, one) in enumerate(said):
            feedback.add(session, owner.id, one, str(number), feedback.Opinion(rating=-1))
    with sessions() as session:
        east = Meaning([1, 0], MODEL)
        near = search.nearest(session, project.id, Search(words="x", feedback="negative"), east)
        assert near == [mine["between"], mine["north"]]
        assert search.nearest(session, project.id, Search(words="x", feedback="none"), east) == [mine["east"]]
        both = Search(words="x", feedback="negative", window="day")
        assert search.nearest(session, project.id, both, east) == near


def test_fusion_puts_what_both_lists_hold_before_what_one_does() -> None:
    a, b, c, d = (uuid.UUID(int=n) for n in range(4))
    assert search.fused([a, b, c], [d, c])[0] == c
    assert search.fused([a], []) == [a]
    assert search.fused([], []) == []


@pytest.fixture
def embedder() -> FakeEmbedder:
    return FakeEmbedder()


@pytest.fixture
def reader(sign_in: SignIn, embedder: FakeEmbedder) -> TestClient:
    client = sign_in("boss@example.org", "admin")
    app: Any = client.app
    while not isinstance(app, Starlette):
        app = getattr(app, "_app", None) or app.app
    app.state.embedder = embedder
    return client


def shown(reader: TestClient, ids: dict[str, UUID], **params: str) -> list[str]:
    text = reader.get("/p/entities/interactions", params=params, headers={"accept": "text/html"}).text
    return sorted(
        (name for name, one in ids.items() if f"/interactions/{one}" in text), key=lambda n: text.index(str(ids[n]))
    )


def test_modes_show_what_they_say_and_words_stand_in_while_the_engine_is_away(
    sessions: Sessions, project: Project, reader: TestClient, embedder: FakeEmbedder
) -> None:
    ids = with_vectors(
        sessions, project, {"a needle": [0.0, 1.0], "thread and needle": [0.6, 0.8], "haystack": [1.0, 0.0]}
    )
    assert set(shown(reader, ids, q="needle")) == {"a needle", "thread and needle"}
    page = reader.get("/p/entities/interactions?q=needle", headers={"accept": "text/html"}).text
    assert "Searched by words alone: the engine cannot be reached" in page
    embedder.vector = [1.0, 0.0]
    assert shown(reader, ids, q="needle", mode="meaning") == ["haystack", "thread and needle", "a needle"]
    assert shown(reader, ids, q="needle")[0] == "thread and needle"
    assert set(shown(reader, ids, q="needle", mode="words")) == {"a needle", "thread and needle"}


# --- making vectors ---------------------------------------------------------------------------------------


class FakeClient:
    """Answers every Pool with a vector made of its length."""

    asked: list[Any]
    gone = False

    def __init__(self, *_: object, **__: object) -> None:
        if FakeClient.gone:
            raise EngineGone("no engine answers")

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def status(self) -> object:
        return type("Status", (), {"base": "f" * 64})()

    def pool_many(self, messages: list[Any]) -> list[Pooled]:
        import numpy as np

        FakeClient.asked += messages
        vector = np.array([3.0, 4.0], dtype="<f4").tobytes()
        return [Pooled(epoch=1, id=one.id, vector=vector, prompt_tokens=1) for one in messages]


def run_job(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        job = jobs.enqueue(session, "search.embed", {"project_id": str(project.id)}, project_id=project.id)
    lease = jobs.claim(sessions, job.id, "test")
    assert lease is not None
    with lease:
        embed.embed_job(lease, Settings())
        lease.succeed()


def kept(sessions: Sessions) -> list[InteractionEmbedding]:
    with sessions() as session:
        return list(session.scalars(select(InteractionEmbedding).order_by(InteractionEmbedding.id)))


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeClient]:
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    monkeypatch.setattr(embed, "SyncEngineClient", FakeClient)
    monkeypatch.setattr(embed, "BATCH", 4)
    FakeClient.asked, FakeClient.gone = [], False
    return FakeClient


def test_live_answers_get_vectors_in_batches_behind_peoples_requests(
    sessions: Sessions, project: Project, fake_engine: type[FakeClient]
) -> None:
    with sessions.begin() as session:
        ids = [seed.interaction(session, project.id, output=f"n{n}", ago=timedelta(minutes=9 - n)).id for n in range(9)]
        seed.interaction(session, project.id, output="test", origin="evaluation")
        seed.interaction(session, project.id, output="", finish_reason="error")
    run_job(sessions, project)
    rows = kept(sessions)
    assert [row.id for row in rows] == ids
    assert {row.model for row in rows} == {"f" * 16 + "/mean"}
    assert [round(float(value), 2) for value in rows[0].vector] == [0.6, 0.8]
    assert {(one.priority, one.namespace) for one in fake_engine.asked} == {("batch", project.id.hex)}
    run_job(sessions, project)
    assert len(fake_engine.asked) == 9


def test_only_the_newest_are_kept_and_another_model_replaces_them(
    sessions: Sessions, project: Project, fake_engine: type[FakeClient]
) -> None:
    with sessions.begin() as session:
        session.get_one(Project, project.id).config = {"embeddings_kept": 3}
        ids = [seed.interaction(session, project.id, output=f"n{n}", ago=timedelta(minutes=9 - n)).id for n in range(6)]
        embeddings.add(session, project.id, "old/mean", {one: [1.0, 0.0] for one in ids})
    run_job(sessions, project)
    assert [row.id for row in kept(sessions)] == ids[-3:]
    assert {row.model for row in kept(sessions)} == {"f" * 16 + "/mean"}


def test_the_schedule_asks_when_answers_have_no_vector_and_not_again_at_once(
    sessions: Sessions, project: Project, other: Project
) -> None:
    indexer = Indexer()
    with sessions.begin() as session:
        logged = seed.interaction(session, project.id, output="one", ago=timedelta(minutes=2))
        seed.interaction(session, other.id, output="two", ago=timedelta(seconds=1))
        now = logged.started_at + timedelta(minutes=2)
        assert indexer.step(session, now) == [project.id]
        assert indexer.step(session, now) == []
        assert project.id not in indexer.step(session, now + EMBED_PAUSE)  # its job is still unfinished
        assert project.id not in indexer.step(session, now + EMBED_PAUSE * 2)  # nothing came of it: twice the pause
        job = session.scalars(select(Job).where(Job.project_id == project.id)).one()
        assert (job.kind, job.priority < 0) == ("search.embed", True)
        embeddings.add(session, project.id, MODEL, {logged.id: [1.0]})
        assert Indexer().step(session, now) == []
