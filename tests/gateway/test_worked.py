"""Corrections placed in prompts: the nearest, where the project allows it, and never at the price of an answer.

The fake engine says the first scripted word it reads in a prompt, so an example that stands before the question shows.
"""

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import httpx
import numpy as np
import pytest
from sqlalchemy import delete, select

from engine.client import EngineGone
from engine.messages import Pool, Pooled
from engine.text.tokenizer import Tokenizer
from services.gateway.engine_link import EngineLink
from services.gateway.instant import Mark, Shelf
from services.gateway.planning import Plan, Worked, placed
from services.gateway.worked import nearest, question_vector
from services.platform.postgres import PostgresServer
from services.store import projects
from services.store.instant_config import WorkedConfig
from services.store.models import ExampleEmbedding, Job
from services.store.worked import ring_where_due
from tests.gateway.judging import judge, person, queued, seconds_until, undo
from tests.gateway.parts import World, make_world
from worker.tasks import perform

TAUGHT = "\x01taught\x02 abcabcabc"
ON: dict[str, object] = {"enabled": True, "similarity": 0.5, "deadline_ms": 2000}


@pytest.fixture(scope="module")
def world(postgres: PostgresServer) -> Iterator[World]:
    with make_world(postgres) as made:
        made.start_engine("--context=256")
        made.start_shipper()
        made.start_gateway()
        yield made


@pytest.fixture(scope="module")
def lead(world: World) -> UUID:
    return person(world, "lead@example.org", "lead")


@pytest.fixture(scope="module")
def example(world: World, lead: UUID) -> str:
    """The id of a placed correction, beside a held-out one of the same question that must never be."""
    configure(world, ON)
    for split in ("held_out", "train"):
        response = send(world, TAUGHT, max_tokens=30)
        judge(world, queued(world, response.headers["x-whet-interaction-id"], split=split), lead, "correct", split)
    embed(world)
    with world.sessions() as session:
        (row,) = session.scalars(select(ExampleEmbedding)).all()
        assert row.completion == "train"
    seconds_until(lambda: examples(send(world, "abcabc \x01own\x02")) == str(row.example_id))
    return str(row.example_id)


def configure(world: World, worked: dict[str, object]) -> None:
    with world.sessions.begin() as session:
        projects.configure(session, projects.get(session, "entities"), {"worked_examples": worked})


def embed(world: World) -> None:
    with world.sessions() as session:
        waiting = session.scalars(select(Job.id).where(Job.kind == "examples.embed", Job.state == "queued")).all()
    for job_id in waiting:
        perform(world.sessions, world.settings, job_id)


def send(world: World, content: str, **fields: object) -> httpx.Response:
    body: dict[str, Any] = {"model": "entities", "messages": [{"role": "user", "content": content}], "temperature": 0}
    response = world.post("/v1/chat/completions", body | {"max_tokens": 20} | fields)
    assert response.status_code == 200, response.text
    return response


def examples(response: httpx.Response) -> str | None:
    found: str | None = response.headers.get("x-whet-worked-examples")
    return found


def said(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def test_the_nearest_correction_stands_in_the_prompt_and_the_log_names_it(world: World, example: str) -> None:
    response = send(world, "abcabc \x01own\x02")
    assert (examples(response), said(response)) == (example, "taught")
    logged = world.interaction(response.headers["x-whet-interaction-id"])
    assert logged.body is not None
    assert logged.body.worked_examples == [example]
    assert logged.body.messages == [{"role": "user", "content": "abcabc \x01own\x02"}]
    assert logged.interaction.origin == "live"
    assert len(logged.body.prompt_token_ids) == logged.interaction.prompt_tokens > len("abcabc \x01own\x02") + 20


@pytest.mark.parametrize(
    ("content", "fields"), [("abcabc \x01own\x02", {"max_tokens": 220}), ("zzzzzzzzzzzz\x01z\x02", {})]
)
def test_what_is_too_long_or_too_far_is_served_without(
    world: World, example: str, content: str, fields: dict[str, object]
) -> None:
    assert examples(send(world, content, **fields)) is None


def test_a_vector_that_does_not_come_holds_nobody_up() -> None:
    class Mute:
        async def pool(self, _: Pool) -> Pooled:
            await asyncio.sleep(60)
            raise AssertionError

    class Gone:
        async def pool(self, _: Pool) -> Pooled:
            raise EngineGone("away")

    for client in (Mute(), Gone()):
        link = cast(EngineLink, SimpleNamespace(client=client))
        project = SimpleNamespace(project=SimpleNamespace(id=UUID(int=1)))
        plan = cast(Plan, SimpleNamespace(target=project, share="k"))
        began = time.monotonic()
        assert asyncio.run(question_vector(plan, [1, 2], link, 0.05)) is None
        assert time.monotonic() - began < 2


def test_a_project_that_does_not_allow_it_gets_none(world: World, example: str) -> None:
    configure(world, ON | {"enabled": False})
    try:
        seconds_until(lambda: examples(send(world, "abcabc \x01own\x02")) is None)
        assert said(send(world, "abcabc \x01own\x02")) == "own"
    finally:
        configure(world, ON)


def test_a_correction_that_is_taken_back_is_placed_no_more(world: World, lead: UUID, example: str) -> None:
    response = send(world, "\x01mistaken\x02 qqqqrrrrqqqqrrrr", max_tokens=30)
    annotation = judge(world, queued(world, response.headers["x-whet-interaction-id"]), lead, "correct", "wrong")
    embed(world)
    seconds_until(lambda: said(send(world, "qqqqrrrrqqqqrrrr \x01own\x02")) in ("mistaken", "taught"))
    before = examples(send(world, "qqqqrrrrqqqqrrrr"))
    assert before is not None
    undo(world, lead, annotation)
    seconds_until(lambda: examples(send(world, "qqqqrrrrqqqqrrrr")) != before)
    embed(world)
    with world.sessions() as session:
        assert [row.completion for row in session.scalars(select(ExampleEmbedding))] == ["train"]


def test_examples_come_behind_the_system_text_the_nearest_last() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    turns = placed(chat, [Worked(UUID(int=1), "far", "a"), Worked(UUID(int=2), "near", "b")])
    assert [turn["content"] for turn in turns] == ["s", "far", "a", "near", "b", "q"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_no_more_are_chosen_than_the_project_allows(world: World) -> None:
    tokenizer = Tokenizer.load(world.settings.model_path)
    vectors = np.eye(4, dtype=np.float32)[:, :3] + np.float32(0.5)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    shelf = Shelf(Mark(4, 0), "b", tuple(UUID(int=n) for n in range(4)), ("aa",) * 4, ("bb",) * 4, vectors)
    asked = np.array([1, 0.2, 0.1], dtype=np.float32)
    ids = [one.id.int for one in nearest(shelf, asked, WorkedConfig(most=3, similarity=-1), tokenizer)]
    assert ids[-1] == 0
    assert len(ids) == 3
    assert len(nearest(shelf, asked, WorkedConfig(most=3, similarity=-1, tokens=40), tokenizer)) == 1
    assert nearest(shelf, asked, WorkedConfig(similarity=0.999), tokenizer) == ()


def test_the_dispatcher_rings_once_for_what_a_running_job_has_missed(world: World, example: str) -> None:
    with world.sessions.begin() as session:
        session.execute(delete(Job).where(Job.kind == "examples.embed"))
        assert ring_where_due(session, datetime.now(UTC)) == [world.projects["entities"]]
        assert ring_where_due(session, datetime.now(UTC)) == []
    embed(world)
