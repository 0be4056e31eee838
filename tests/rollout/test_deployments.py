"""The deployment row: compare-and-set, the way back, the life of an artefact."""

import random
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import audit, deployments, lifecycle, projects, rollouts
from services.store.base import make_sessions, uuid7
from services.store.models import Artifact, Deployment, DeploymentEvent
from services.store.rollout_config import RolloutConfig
from tests.rollout.conftest import World
from tests.rollout.trials import BY_ADA

A, B, C = "a" * 64, "b" * 64, "c" * 64


def flip(world: World, digest: str | None, generation: int) -> Deployment:
    with world.sessions.begin() as session:
        return deployments.flip(
            session, world.project_id, expected_generation=generation, digest=digest, actor="test", reason="better",
            evidence={"rows": 10},
        )  # fmt: skip


def back(world: World) -> Deployment:
    with world.sessions.begin() as session:
        return deployments.roll_back(session, world.project_id, actor="ada", reason="worse")


def try_again(session: Session, world: World, digest: str) -> None:
    """As the deploy job does with what a person puts on trial."""
    deployments.advance(session, digest, "staged")
    rollouts.begin(session, world.project_id, digest, RolloutConfig(), BY_ADA, None)


def now(world: World) -> Deployment:
    with world.sessions() as session:
        return deployments.get(session, world.project_id)


def test_a_flip_serves_the_new_digest_and_remembers_the_way_back(world: World) -> None:
    world.artifact(A, "staged")
    world.artifact(B, "staged")

    flip(world, A, 1)
    after = flip(world, B, 2)

    assert (after.active_digest, after.last_good_digest, after.generation) == (B, A, 3)
    assert (world.state(A), world.state(B)) == ("retired", "live")
    with world.sessions() as session:
        newest, oldest = deployments.events(session, world.project_id)
        assert (newest.from_digest, newest.to_digest, newest.generation) == (A, B, 3)
        assert newest.evidence == {"rows": 10, "states": [[B, "staged", "live"], [A, "live", "retired"]]}
        assert (oldest.from_digest, oldest.to_digest, oldest.generation) == (None, A, 2)
        assert audit.verify(session).rows == 2


def test_of_eight_flips_from_one_generation_exactly_one_wins(world: World, database_url: str) -> None:
    digests = [world.artifact(f"{number}" * 64, "staged") for number in range(8)]
    world.sessions = make_sessions(database_url, pool_size=10)

    def attempt(digest: str) -> bool:
        try:
            flip(world, digest, 1)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, digests))

    assert won.count(True) == 1
    assert now(world).active_digest == digests[won.index(True)]
    assert sorted(world.state(digest) for digest in digests) == ["live"] + ["staged"] * 7
    world.sessions.kw["bind"].dispose()


def test_roll_back_goes_to_the_last_good_then_to_what_that_had_replaced_then_to_the_base(world: World) -> None:
    for generation, digest in enumerate((A, B, C), start=1):
        flip(world, world.artifact(digest, "staged"), generation)

    assert back(world).active_digest == B
    assert back(world).active_digest == A
    assert back(world).active_digest is None
    assert [world.state(digest) for digest in (A, B, C)] == ["rolled_back"] * 3
    with pytest.raises(Conflict, match="nothing to roll back"):
        back(world)


@pytest.mark.parametrize("fate", ["rolled_back", "quarantined", "tainted"])
def test_condemned_or_tainted_meanwhile_the_last_good_is_passed_over(world: World, fate: str) -> None:
    for generation, digest in enumerate((A, B, C), start=1):
        flip(world, world.artifact(digest, "staged"), generation)
    with world.sessions.begin() as session:
        if fate == "tainted":
            session.execute(update(Artifact).where(Artifact.digest == B).values(tainted_at=func.now()))
            lifecycle.mend_last_good(session, [B])
        else:
            try_again(session, world, B)
            rollouts.end(session, world.project_id, fate, BY_ADA)
    assert (now(world).active_digest, now(world).last_good_digest) == (C, A)
    assert (back(world).active_digest, now(world).last_good_digest) == (A, None)


def test_a_last_good_on_trial_is_undecided_and_not_gone_back_to(world: World) -> None:
    for generation, digest in enumerate((A, B), start=1):
        flip(world, world.artifact(digest, "staged"), generation)
    with world.sessions.begin() as session:
        try_again(session, world, A)
    assert back(world).active_digest is None
    assert (world.state(A), world.state(B)) == ("retired", "rolled_back")


def test_a_rolled_back_artefact_never_goes_live_again(world: World) -> None:
    flip(world, world.artifact(A, "staged"), 1)
    back(world)

    with pytest.raises(Conflict, match="rolled_back and cannot become live"):
        flip(world, A, 3)
    assert now(world).active_digest is None


def test_a_roll_back_made_meanwhile_refuses_the_flip(world: World) -> None:
    flip(world, world.artifact(A, "staged"), 1)
    world.artifact(B, "staged")
    back(world)

    with pytest.raises(Conflict, match="moved from generation 2 to 3"):
        flip(world, B, 2)
    assert now(world).active_digest is None
    assert world.state(B) == "staged"


@pytest.mark.parametrize("state", ["built", "verified", "rejected", "quarantined", "rolled_back"])
def test_only_a_staged_artefact_goes_live(world: World, state: str) -> None:
    world.artifact(A, state)

    with pytest.raises(Conflict, match="cannot become live"):
        flip(world, A, 1)
    assert (now(world).active_digest, now(world).generation) == (None, 1)


def test_an_artefact_of_another_project_is_refused(world: World) -> None:
    with world.sessions.begin() as session:
        other = projects.create(session, "other").id
    world.artifact(A, "staged", project_id=other)

    with pytest.raises(Conflict, match="does not belong"):
        flip(world, A, 1)


def test_a_frozen_deployment_takes_no_promotion_but_can_go_back(world: World) -> None:
    flip(world, world.artifact(A, "staged"), 1)
    world.artifact(B, "staged")
    with world.sessions.begin() as session:
        session.execute(update(Deployment).values(frozen=True))

    with pytest.raises(Conflict, match="frozen"):
        flip(world, B, 2)
    assert back(world).active_digest is None


def test_a_person_can_flip_to_the_base(world: World) -> None:
    flip(world, world.artifact(A, "staged"), 1)

    after = flip(world, None, 2)

    assert (after.active_digest, after.last_good_digest, world.state(A)) == (None, A, "retired")


def test_an_unknown_project_is_not_found(world: World) -> None:
    with world.sessions() as session:
        with pytest.raises(NotFound):
            deployments.get(session, uuid7())
        with pytest.raises(NotFound):
            deployments.advance(session, "nope", "verified")


@pytest.mark.parametrize(
    ("old", "new"),
    [("built", "staged"), ("built", "live"), ("verified", "live"), ("rejected", "verified"), ("live", "staged")],
)
def test_an_artefact_skips_no_station(world: World, old: str, new: str) -> None:
    world.artifact(A, old)

    with world.sessions.begin() as session, pytest.raises(Conflict, match=f"is {old} and cannot become {new}"):
        deployments.advance(session, A, new)


def test_after_any_history_exactly_what_serves_is_live(world: World) -> None:
    choose = random.Random(5)
    digests: list[str] = []
    for step in range(80):
        deployment = now(world)
        going_back = deployment.active_digest is not None and choose.random() < 0.25
        try:
            if going_back:
                back(world)
            elif digests and choose.random() < 0.5:
                with world.sessions.begin() as session:
                    if deployment.canary_digest is None:
                        try_again(session, world, choose.choice(digests))
                    else:
                        stage = choose.choice(["stopped", "rejected", "rolled_back", "quarantined"])
                        rollouts.end(session, world.project_id, stage, BY_ADA)
            else:
                digests.append(world.artifact(f"{step:064x}", "staged"))
                stale = choose.random() < 0.2
                flip(world, choose.choice([*digests, None]), deployment.generation - stale)
        except Conflict:
            assert not going_back, "there is always a way back"
            assert now(world).generation == deployment.generation
        else:
            assert now(world).generation == deployment.generation + 1
        check_invariants(world, world.project_id)


def check_invariants(world: World, project_id: UUID) -> None:
    with world.sessions() as session:
        deployment = deployments.get(session, project_id)
        live = session.scalars(select(Artifact.digest).where(Artifact.state == "live")).all()
        assert live == ([deployment.active_digest] if deployment.active_digest else [])
        changes = DeploymentEvent.kind.in_(("flip", "roll_back")) | DeploymentEvent.kind.like("canary%")
        events = session.scalar(select(func.count()).select_from(DeploymentEvent).where(changes))
        assert events == deployment.generation - 1
        if deployment.last_good_digest:
            assert session.get_one(Artifact, deployment.last_good_digest).state in ("retired", "staged", "canary")
