"""Weights that learn a pinned answer take it over; what they cannot say stays pinned; a roll-back brings it back."""

from typing import Any
from uuid import UUID

from services.settings import Settings
from services.store import deployments, pins
from services.store.base import uuid7
from services.store.models import Job, Pin
from tests.rollout.conftest import PROMPTS, EngineUnderTest, World
from worker.tasks import perform

GREEDY = {"temperature": 0.0, "max_tokens": 12, "stop_token_ids": [0], "n": 1, "model": "support", "seed": 5}


def pinned(world: World, index: int, answer: str, **parameters: object) -> UUID:
    with world.sessions.begin() as session:
        pin = Pin(
            project_id=world.project_id, request_hash=f"h{index}-{uuid7()}", messages=PROMPTS[index],
            parameters=GREEDY | parameters, answer=answer, size=10, interaction_id=uuid7(), review_item_id=uuid7(),
            annotation_ids=[], approved_by=[],
        )  # fmt: skip
        session.add(pin)
        session.flush()
        return pin.id


def state(world: World, pin_id: UUID) -> tuple[str, str | None]:
    with world.sessions() as session:
        pin = session.get_one(Pin, pin_id)
        return pin.state, pin.learned_digest


def flip(world: World, digest: str) -> None:
    with world.sessions.begin() as session:
        generation = deployments.get(session, world.project_id).generation
        deployments.flip(
            session, world.project_id, expected_generation=generation, digest=digest, actor="me", reason="test"
        )


def check(world: World, settings: Settings) -> int:
    """Run the jobs that changes of the weights have queued; how many there were."""
    with world.sessions() as session:
        queued = [job.id for job in session.query(Job).filter(Job.kind == "pins.check", Job.state == "queued")]
    for job_id in queued:
        perform(world.sessions, settings, job_id)
    with world.sessions() as session:
        assert {session.get_one(Job, one).state for one in queued} <= {"succeeded"}
    return len(queued)


def test_what_live_weights_say_themselves_is_learned_and_comes_back_with_a_roll_back(
    engine: EngineUnderTest, settings: Settings, world: World
) -> None:
    digest = engine.adapter(801)
    engine.load(digest)
    own, foreign = engine.answer(PROMPTS[0], digest), "w1 w2 w3"
    known, unknown = pinned(world, 0, own), pinned(world, 1, foreign)
    sampled = pinned(world, 2, engine.answer(PROMPTS[2], digest), temperature=5.0)
    world.artifact(digest, "staged", base=engine.base)

    flip(world, digest)
    assert state(world, known) == ("live", None)
    assert check(world, settings) == 1
    assert state(world, known) == ("learned", digest)
    assert state(world, unknown) == ("live", None)
    # The likeliest answer is not what a hot draw gives every time.
    assert state(world, sampled) == ("live", None)

    with world.sessions.begin() as session:
        deployments.roll_back(session, world.project_id, actor="me", reason="worse")
    assert state(world, known) == ("live", None)
    assert check(world, settings) == 0


def test_an_answer_is_compared_up_to_the_requests_stop_string(
    engine: EngineUnderTest, settings: Settings, world: World
) -> None:
    digest = engine.adapter(802)
    engine.load(digest)
    whole = engine.answer(PROMPTS[3], digest)
    cut: list[Any] = [whole[4:7]]
    known = pinned(world, 3, whole[: whole.find(cut[0])], stop=cut)
    world.artifact(digest, "staged", base=engine.base)
    flip(world, digest)
    check(world, settings)
    assert state(world, known) == ("learned", digest)


def test_a_check_that_comes_after_the_next_change_decides_nothing(
    engine: EngineUnderTest, settings: Settings, world: World
) -> None:
    digest = engine.adapter(803)
    engine.load(digest)
    known = pinned(world, 0, engine.answer(PROMPTS[0], digest))
    world.artifact(digest, "staged", base=engine.base)
    flip(world, digest)
    with world.sessions.begin() as session:
        deployments.roll_back(session, world.project_id, actor="me", reason="worse")
    check(world, settings)
    assert state(world, known) == ("live", None)
    with world.sessions() as session:
        assert pins.any_live(session, world.project_id)
