"""Who meets a candidate: a sticky share of the users, both arms in the log with their weights, and nobody else."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest
from sqlalchemy import select

from services.errors import NO_SLOT
from services.gateway.access import Target
from services.gateway.bodies import parse_chat, parse_text
from services.gateway.canary import draw, placed, unit_of
from services.gateway.snapshot import Trial
from services.platform.postgres import PostgresServer
from services.store import deployments, rollout_counts, rollouts
from services.store.models import Artifact, Interaction, Rollout
from services.store.rollout_config import RolloutConfig
from services.store.rollouts import Decision
from services.store.speculation import Heads
from tests.gateway.parts import World, eventually, make_world
from tests.gateway.test_planning import PROJECT

LIVE, NEW = "a" * 64, "b" * 64
CHAT = {"model": "entities", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
KEY = UUID(int=7)
TRYING = replace(PROJECT, active=LIVE, trial=Trial(NEW, 0.2, "salt"), heads=Heads(live="h" * 64))


def target(**fields: object) -> Target:
    return placed(Target(TRYING, (LIVE, None)), parse_chat(json.dumps(CHAT | fields).encode()), KEY)


def test_a_user_stays_in_one_arm_and_the_share_is_kept() -> None:
    arms = [target(user=f"user-{number}").arm for number in range(4000)]
    assert arms == [target(user=f"user-{number}").arm for number in range(4000)]
    assert 0.17 < arms.count("canary") / 4000 < 0.23
    assert set(arms) == {"canary", "control"}


def test_the_candidate_comes_first_and_what_serves_everybody_else_after_it() -> None:
    by_arm = {one.arm: one.candidates for one in (target(user=f"user-{number}") for number in range(60))}
    assert by_arm == {"canary": (NEW, LIVE, None), "control": (LIVE, None)}


def test_another_salt_draws_other_users() -> None:
    users = [f"u:user-{number}" for number in range(2000)]
    first, second = ({user for user in users if draw(salt, user) < 0.2} for salt in ("one", "two"))
    assert 0.02 < len(first & second) / 2000 < 0.065


@pytest.mark.parametrize(
    ("fields", "unit"),
    [
        ({"user": "mia", "whet": {"session": "s", "group": "g"}}, "u:mia"),
        ({"whet": {"session": "s", "group": "g"}}, "s:s"),
        ({"whet": {"group": "g"}}, f"k:{KEY}:g"),
    ],
)
def test_the_unit_is_the_user_else_the_session_else_the_key_and_the_group(fields: dict[str, object], unit: str) -> None:
    assert unit_of(parse_chat(json.dumps(CHAT | fields).encode()), KEY) == unit


def test_without_any_of_them_equal_prompts_stay_together_and_others_are_spread() -> None:
    asks = [parse_text(json.dumps({"model": "entities", "prompt": f"p{n % 500}"}).encode()) for n in range(1000)]
    units = [unit_of(ask, KEY) for ask in asks]
    assert units[:500] == units[500:]
    assert len(set(units)) == 500


def test_many_prompts_of_nobody_in_particular_are_in_no_arm() -> None:
    several = {"model": "entities", "prompt": ["one", "two"]}
    arms = [
        placed(Target(TRYING, (LIVE, None)), parse_text(json.dumps(several | said).encode()), KEY).arm
        for said in ({}, {"user": "mia"}, {"whet": {"group": "g"}})
    ]
    assert arms[0] == "active"
    assert set(arms[1:]) <= {"canary", "control"}


def test_who_names_certain_weights_gets_them() -> None:
    pinned = Target(TRYING, (LIVE,), pinned=True)
    assert placed(pinned, parse_chat(json.dumps(CHAT).encode()), KEY) == pinned


def test_without_a_candidate_nothing_changes() -> None:
    quiet = Target(PROJECT, (None,))
    assert placed(quiet, parse_chat(json.dumps(CHAT).encode()), KEY) == quiet


@pytest.fixture(scope="module")
def trying(postgres: PostgresServer) -> Iterator[World]:
    """A gateway whose project serves one adapter and tries another on half of the users."""
    with make_world(postgres) as world:
        world.add_adapter("entities", LIVE)
        world.add_adapter("entities", NEW)
        world.start_engine()
        world.start_shipper()
        world.start_gateway()
        world.deploy("entities", LIVE)
        yield world


def settle(world: World, generation: int) -> None:
    """Until the gateway has heard of it."""
    eventually(lambda: world.get("/v1/models/entities").json()["whet"]["generation"] == generation)


def asked(world: World, user: str, **fields: object) -> tuple[str, str | None, str | None, int]:
    """The arm, the adapter that served, the heads asked for and the generation, as the log has them."""
    response = world.post("/v1/chat/completions", CHAT | {"user": user} | fields)
    assert response.status_code == 200, response.text
    row = world.interaction(response.headers["x-whet-interaction-id"]).interaction
    assert response.headers["x-whet-adapter"] == row.adapter_digest
    return row.arm, row.adapter_digest, row.speculator_digest, row.generation


def test_both_arms_are_served_logged_and_over_when_the_canary_is(trying: World) -> None:
    project = trying.projects["entities"]
    assert asked(trying, "mia")[:2] == ("active", LIVE)
    with trying.sessions.begin() as session:
        for state in ("verified", "staged"):
            deployments.advance(session, NEW, state)
        rollout = rollouts.begin(
            session, project, NEW, RolloutConfig(share=0.5), Decision("ada", "try it", {}), None
        )  # fmt: skip
        generation = rollout.generation
    settle(trying, generation)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: asked(trying, f"user-{number}"), range(24)))
    assert {(arm, adapter) for arm, adapter, _, _ in found} == {("canary", NEW), ("control", LIVE)}
    assert {row[3] for row in found} == {generation}
    again = [asked(trying, f"user-{number}")[0] for number in range(6)]
    assert again == [row[0] for row in found[:6]]
    assert asked(trying, "user-0", model=f"entities@{LIVE}")[:2] == ("active", LIVE)
    with trying.sessions.begin() as session:
        after = rollouts.back(session, project, "newest", Decision("ada", "enough", {})).generation
    settle(trying, after)
    assert {asked(trying, f"user-{number}")[:2] for number in range(8)} == {("active", LIVE)}


def test_what_finds_no_slot_is_logged_as_the_counts_pass_it_over(trying: World) -> None:
    """One sentence joins the two: the gateway writes it, and a canary is not judged by the requests that bear it."""
    project, crowded = trying.projects["entities"], trying.add_adapter("entities", "e" * 64)
    (trying.settings.artifacts / crowded / "slot.lost").touch()
    served = trying.post("/v1/chat/completions", CHAT | {"user": "mia"}).headers["x-whet-interaction-id"]
    base = trying.interaction(served).interaction.base_digest
    with trying.sessions.begin() as session:
        session.get_one(Artifact, crowded).base_digest = base
        for state in ("verified", "staged"):
            deployments.advance(session, crowded, state)
        rollout = rollouts.begin(
            session, project, crowded, RolloutConfig(share=0.5), Decision("ada", "try it", {}), None
        )  # fmt: skip
    settle(trying, rollout.generation)

    broken = {"messages": [{"role": "user", "content": "\x04"}]}
    refused = [trying.post("/v1/chat/completions", CHAT | broken | {"user": f"user-{n}"}) for n in range(12)]
    crowded_out = sum(answer.json()["error"]["code"] == "overloaded" for answer in refused)
    assert 0 < crowded_out < 12
    eventually(lambda: len(logged(trying, rollout.generation)) == 12)
    assert [row.error for row in logged(trying, rollout.generation) if row.arm == "canary"] == [NO_SLOT] * crowded_out

    with trying.sessions.begin() as session:
        span = rollout_counts.Span(rollout.canary_at or datetime.now(UTC), datetime.now(UTC), None)
        rollout_counts.fold(session, session.get_one(Rollout, rollout.id), span)
        found = rollout_counts.moments(session, rollout.id)
        rollouts.end(session, project, "stopped", Decision("ada", "enough", {}))
    assert found[rollout_counts.ROUTED].canary.n == crowded_out
    assert found["errors"].canary.n == 0
    assert found["errors"].control.n == 12 - crowded_out, "what fails in the engine counts"


def logged(world: World, generation: int) -> list[Interaction]:
    with world.sessions() as session:
        rows = select(Interaction).where(
            Interaction.project_id == world.projects["entities"], Interaction.generation == generation,
            Interaction.finished_at.is_not(None),
        )  # fmt: skip
        return list(session.scalars(rows))
