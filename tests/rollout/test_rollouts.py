"""A candidate's way to traffic as changes of the row: what each does, whom it refuses, and the freeze."""

from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.console import run_view
from services.errors import Conflict
from services.store import deployments, projects, rollouts, runs
from services.store.base import make_sessions
from services.store.models import Artifact, Job, Project, RolloutCount, Run
from services.store.rollout_config import RolloutConfig, Shadowing
from services.store.rollouts import Decision
from tests.rollout.conftest import World
from tests.rollout.trials import (
    BY_ADA,
    LIVE,
    NEW,
    NEWER,
    answer,
    begin,
    current,
    deployment,
    kinds,
    look,
    newest,
    serve,
)


def test_a_canary_serves_its_share_beside_what_is_live(world: World) -> None:
    serve(world)
    rollout = begin(world, share=0.2)
    row = deployment(world)
    assert (row.active_digest, row.canary_digest, row.canary_share, row.generation) == (LIVE, NEW, 0.2, 3)
    assert (rollout.stage, rollout.generation, rollout.baseline_digest, rollout.share) == ("canary", 3, LIVE, 0.2)
    assert (world.state(NEW), world.state(LIVE)) == ("canary", "live")
    event = newest(world)
    assert (event.kind, event.from_digest, event.to_digest) == ("canary", LIVE, NEW)
    assert event.evidence == {"share": 0.2, "states": [[NEW, "staged", "canary"]]}


def test_in_the_shadow_nobody_is_served_until_the_canary_begins(world: World) -> None:
    serve(world)
    rollout = begin(world, shadow=Shadowing(requests=20).model_dump())
    assert (deployment(world).canary_share, deployment(world).generation, world.state(NEW)) == (0.0, 3, "shadow")
    salt = rollout.salt
    with world.sessions.begin() as session:
        rollouts.begin_canary(session, world.project_id, BY_ADA)
    after = current(world)
    assert (after.stage, deployment(world).canary_share, world.state(NEW)) == ("canary", 0.1, "canary")
    assert after.salt != salt
    assert kinds(world)[-2:] == ["shadow", "canary"]


def test_a_promoted_candidate_is_live_and_its_counts_are_gone(world: World) -> None:
    serve(world)
    rollout = begin(world)
    answer(world, rollout, "canary", "ada")
    look(world)
    assert counts(world) > 0
    with world.sessions.begin() as session:
        rollouts.promote(session, world.project_id, BY_ADA)
    row = deployment(world)
    assert (row.active_digest, row.last_good_digest, row.canary_digest, row.canary_share) == (NEW, LIVE, None, 0.0)
    assert (current(world).stage, current(world).ending, counts(world)) == ("promoted", "because", 0)
    assert (world.state(NEW), world.state(LIVE)) == ("live", "retired")
    assert newest(world).evidence["candidate_requests"] == 1


@pytest.mark.parametrize(
    ("stage", "state"),
    [("stopped", "retired"), ("rolled_back", "rolled_back"), ("rejected", "retired"), ("quarantined", "quarantined")],
)
def test_a_canary_that_ends_leaves_what_is_live_alone(world: World, stage: str, state: str) -> None:
    serve(world)
    begin(world)
    with world.sessions.begin() as session:
        rollouts.end(session, world.project_id, stage, BY_ADA)
    row = deployment(world)
    assert (row.active_digest, row.canary_digest, row.generation) == (LIVE, None, 4)
    assert (current(world).stage, world.state(NEW), world.state(LIVE)) == (stage, state, "live")
    assert newest(world).kind == f"canary_{stage}"


def test_a_stopped_one_may_be_tried_again_and_a_condemned_one_may_not(world: World) -> None:
    serve(world)
    begin(world)
    with world.sessions.begin() as session:
        rollouts.end(session, world.project_id, "stopped", BY_ADA)
        deployments.advance(session, NEW, "staged")
        rollouts.begin(session, world.project_id, NEW, RolloutConfig(), BY_ADA, None)
        rollouts.back(session, world.project_id, "newest", BY_ADA)
    with world.sessions() as session, pytest.raises(Conflict, match="rolled_back and cannot become staged"):
        deployments.advance(session, NEW, "staged")


def test_a_newer_candidate_takes_an_undecided_ones_place(world: World) -> None:
    serve(world)
    begin(world)
    begin(world, NEWER)
    assert (world.state(NEW), world.state(NEWER), deployment(world).canary_digest) == ("retired", "canary", NEWER)
    assert kinds(world)[-2:] == ["canary_superseded", "canary"]
    with world.sessions() as session:
        replaced = deployments.events(session, world.project_id)[1]
    assert replaced.reason == f"a newer candidate came before this one was decided on: {BY_ADA.reason}"


def test_a_roll_back_of_what_is_live_ends_the_canary_beside_it(world: World) -> None:
    serve(world)
    begin(world)
    with world.sessions.begin() as session:
        rollouts.back(session, world.project_id, "live", BY_ADA)
    assert (deployment(world).active_digest, deployment(world).canary_digest) == (None, None)
    assert (world.state(LIVE), world.state(NEW), current(world).stage) == ("rolled_back", "retired", "superseded")
    assert newest(world).evidence["states"] == [[LIVE, "live", "rolled_back"], [NEW, "canary", "retired"]]


def test_the_way_back_undoes_the_newest_change_first(world: World) -> None:
    serve(world)
    begin(world)
    with world.sessions.begin() as session:
        rollouts.back(session, world.project_id, "newest", BY_ADA)
    assert (deployment(world).active_digest, world.state(NEW)) == (LIVE, "rolled_back")
    with world.sessions.begin() as session:
        rollouts.back(session, world.project_id, "newest", BY_ADA)
    assert (deployment(world).active_digest, world.state(LIVE)) == (None, "rolled_back")


def test_going_back_in_the_shadow_condemns_nobody(world: World) -> None:
    serve(world)
    begin(world, shadow={"requests": 5})
    with world.sessions.begin() as session:
        rollouts.back(session, world.project_id, "newest", BY_ADA)
    assert (world.state(NEW), current(world).stage) == ("retired", "stopped")


def test_another_share_draws_anew_and_starts_the_comparison_over(world: World) -> None:
    serve(world)
    rollout = begin(world)
    answer(world, rollout, "canary", "ada")
    look(world)
    with world.sessions.begin() as session:
        rollouts.change_share(session, world.project_id, 0.3, BY_ADA)
    after = current(world)
    assert (after.share, deployment(world).canary_share, counts(world)) == (0.3, 0.3, 0)
    assert after.salt != rollout.salt
    assert after.generation == deployment(world).generation == rollout.generation + 1
    assert (after.verdict, after.track, newest(world).evidence["before"]) == ({}, [], 0.1)
    with world.sessions() as session, pytest.raises(Conflict, match="30% already"):
        rollouts.change_share(session, world.project_id, 0.3, BY_ADA)


def test_two_automatic_roll_backs_freeze_until_somebody_has_looked(world: World) -> None:
    serve(world)
    for digest in (NEW, NEWER):
        begin(world, digest)
        with world.sessions.begin() as session:
            rollouts.end(session, world.project_id, "rolled_back", BY_ADA, automatic=True)
    assert (deployment(world).frozen, deployment(world).automatic_rollbacks) == (True, 2)
    assert kinds(world)[-1] == "frozen"
    world.artifact("4" * 64, "staged")
    with world.sessions() as session, pytest.raises(Conflict, match="a person has to look first"):
        rollouts.begin(session, world.project_id, "4" * 64, RolloutConfig(), BY_ADA, None)
    with world.sessions.begin() as session:
        deployments.unfreeze(session, world.project_id, actor="ada", reason="the feedback form was broken")
        rollouts.begin(session, world.project_id, "4" * 64, RolloutConfig(), BY_ADA, None)
    assert deployment(world).automatic_rollbacks == 0
    assert kinds(world)[-2:] == ["looked", "canary"]
    with world.sessions() as session, pytest.raises(Conflict, match="not frozen"):
        deployments.unfreeze(session, world.project_id, actor="ada", reason="again")


def test_roll_backs_that_people_ask_for_freeze_nothing(world: World) -> None:
    serve(world)
    for digest in (NEW, NEWER):
        begin(world, digest)
        with world.sessions.begin() as session:
            rollouts.back(session, world.project_id, "newest", BY_ADA)
    assert (deployment(world).frozen, deployment(world).automatic_rollbacks) == (False, 0)


def test_how_many_it_takes_is_the_projects_own_setting(world: World) -> None:
    with world.sessions.begin() as session:
        project = session.get_one(Project, world.project_id)
        projects.configure(session, project, {"rollout": {"freeze_after": 1}})
    serve(world)
    begin(world)
    with world.sessions.begin() as session:
        rollouts.end(session, world.project_id, "rolled_back", BY_ADA, automatic=True)
    assert deployment(world).frozen


def test_a_decision_from_an_older_look_changes_nothing(world: World) -> None:
    serve(world)
    begin(world)
    stale = Decision("ada", "because", {}, generation=2)
    for change in (
        lambda session: rollouts.promote(session, world.project_id, stale),
        lambda session: rollouts.end(session, world.project_id, "stopped", stale),
        lambda session: rollouts.change_share(session, world.project_id, 0.4, stale),
        lambda session: rollouts.back(session, world.project_id, "newest", stale),
    ):
        with world.sessions() as session, pytest.raises(Conflict, match="moved from generation 2 to 3"):
            change(session)
    assert (deployment(world).generation, current(world).stage) == (3, "canary")


def test_a_word_on_one_candidate_in_the_shadow_is_none_on_the_next(world: World) -> None:
    serve(world)
    begin(world, NEW, shadow={"requests": 5})
    seen = Decision("ada", "because", {}, generation=deployment(world).generation)
    begin(world, NEWER, shadow={"requests": 5})
    with world.sessions() as session, pytest.raises(Conflict, match="moved from generation"):
        rollouts.promote(session, world.project_id, seen)
    assert (world.state(NEW), world.state(NEWER)) == ("retired", "shadow")


@pytest.mark.parametrize(
    ("ending", "phase", "steps"),
    [("promoted", "live", ["done", "done"]), ("rolled_back", "rolled back", ["failed", "ahead"]),
     ("stopped", "stopped", ["done", "ahead"])],
)  # fmt: skip
def test_a_run_says_what_became_of_its_candidate(world: World, ending: str, phase: str, steps: list[str]) -> None:
    serve(world)
    run_id = world.run(world.artifact(NEW, "staged"), outputs=[])
    with world.sessions.begin() as session:
        rollout = rollouts.begin(
            session, world.project_id, NEW, RolloutConfig(shadow=Shadowing(requests=5)), BY_ADA, run_id
        )
        run = runs.get(session, run_id)
        runs.finish(session, run, "succeeded", rollout.stage)
        assert path(session, run)[-2:] == ["now", "ahead"]
        rollouts.begin_canary(session, world.project_id, BY_ADA)
        assert (run.phase, path(session, run)[-2:]) == ("canary", ["now", "ahead"])
        if ending == "promoted":
            rollouts.promote(session, world.project_id, BY_ADA)
        else:
            rollouts.end(session, world.project_id, ending, BY_ADA)
        assert (run.phase, path(session, run)[-2:]) == (phase, steps)


def taught(world: World, digest: str, phase: str, *, state: str = "succeeded") -> UUID:
    """A run that is over, and the artefact it made."""
    run_id = world.run(world.artifact(digest, "staged"), outputs=[])
    with world.sessions.begin() as session:
        session.get_one(Artifact, digest).run_id = run_id
        run = runs.get(session, run_id)
        run.state, run.phase, run.error = state, phase, None if state == "succeeded" else "overtaken"
    return run_id


@pytest.mark.parametrize("condemned", ["rolled_back", "quarantined"])
def test_a_run_says_what_became_of_its_live_weights(world: World, condemned: str) -> None:
    first, second = taught(world, LIVE, "deploying"), taught(world, NEW, "deploying")
    for digest in (LIVE, NEW):
        flip(world, digest)
    assert (world.read_run(first).phase, world.read_run(second).phase) == ("retired", "live")
    with world.sessions.begin() as session:
        deployments.roll_back(session, world.project_id, actor="dispatcher", reason="r", condemned_state=condemned)
    assert (world.read_run(first).phase, world.read_run(second).phase) == ("live", condemned.replace("_", " "))
    with world.sessions() as session:
        assert path(session, runs.get(session, first))[-1] == "done"
        steps = run_view.describe(session, runs.get(session, second))["steps"]
        assert [(step.name, step.state) for step in steps[-2:]] == [("Deploy", "done"), ("Live", "failed")]


@pytest.mark.parametrize(("phase", "state"), [("rejected", "succeeded"), ("stopped", "succeeded"),
                                              ("superseded", "succeeded"), ("superseded", "failed"),
                                              ("failed", "failed"), ("cancelled", "cancelled")])  # fmt: skip
def test_the_run_of_a_candidate_put_on_trial_by_hand_is_told_too(world: World, phase: str, state: str) -> None:
    serve(world)
    run_id = taught(world, NEW, phase, state=state)
    with world.sessions.begin() as session:
        config = RolloutConfig(shadow=Shadowing(requests=5))
        assert rollouts.begin(session, world.project_id, NEW, config, BY_ADA, None).run_id == run_id
    assert world.read_run(run_id).phase == "shadow"
    with world.sessions.begin() as session:
        rollouts.begin_canary(session, world.project_id, BY_ADA)
        rollouts.promote(session, world.project_id, BY_ADA)
    run = world.read_run(run_id)
    assert (run.state, run.phase, run.error) == ("succeeded", "live", None)
    with world.sessions() as session:
        told = [event.payload["phase"] for event in runs.events(session, run_id)]
    assert told == ["shadow", "canary", "live"], "each once"


def test_weights_that_were_live_and_are_tried_again_are_not_live_now(world: World) -> None:
    run_id = taught(world, NEW, "deploying")
    flip(world, NEW)
    serve(world)
    config = RolloutConfig(shadow=Shadowing(requests=5))
    with world.sessions.begin() as session:
        run = runs.get(session, run_id)
        assert path(session, run)[-1] == "done"
        deployments.advance(session, NEW, "staged")
        rollouts.begin(session, world.project_id, NEW, config, BY_ADA, None)
        steps = run_view.describe(session, run)["steps"]
        assert [(step.name, step.state) for step in steps[-2:]] == [("Try", "now"), ("Live", "ahead")]
        rollouts.begin_canary(session, world.project_id, BY_ADA)
        assert path(session, run)[-2:] == ["now", "ahead"]
        rollouts.end(session, world.project_id, "rolled_back", BY_ADA)
        assert path(session, run)[-2:] == ["failed", "ahead"]


def test_the_run_of_weights_that_serve_after_all_is_not_failed(world: World) -> None:
    run_id = taught(world, NEW, "failed", state="failed")
    flip(world, NEW)
    run = world.read_run(run_id)
    assert (run.state, run.phase, run.error) == ("succeeded", "live", None)
    with world.sessions() as session:
        assert set(path(session, run)) == {"done"}


def test_a_run_at_work_says_itself_what_becomes_of_its_weights(world: World) -> None:
    run_id = world.run(world.artifact(NEW, "staged"), outputs=[])
    flip(world, NEW)
    assert (world.read_run(run_id).state, world.read_run(run_id).phase) == ("running", "deploying")


def flip(world: World, digest: str) -> None:
    with world.sessions.begin() as session:
        generation = deployments.get(session, world.project_id).generation
        deployments.flip(
            session, world.project_id, expected_generation=generation, digest=digest, actor="test", reason="r"
        )


def path(session: Session, run: Run) -> list[str]:
    return [step.state for step in run_view.describe(session, run)["steps"]]


def test_of_eight_people_who_end_it_at_once_one_does(world: World, database_url: str) -> None:
    serve(world)
    begin(world)
    world.sessions = make_sessions(database_url, pool_size=10)

    def attempt(number: int) -> bool:
        try:
            with world.sessions.begin() as session:
                if number % 2:
                    rollouts.promote(session, world.project_id, BY_ADA)
                else:
                    rollouts.end(session, world.project_id, "stopped", BY_ADA)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, range(8))).count(True) == 1
    with world.sessions() as session:
        states = session.scalars(select(Artifact.state).where(Artifact.state == "live")).all()
    assert (len(states), deployment(world).generation) == (1, 4)
    world.sessions.kw["bind"].dispose()


def test_there_is_nothing_to_decide_on_without_a_candidate(world: World) -> None:
    serve(world)
    for change in (
        lambda session: rollouts.promote(session, world.project_id, BY_ADA),
        lambda session: rollouts.end(session, world.project_id, "stopped", BY_ADA),
        lambda session: rollouts.begin_canary(session, world.project_id, BY_ADA),
    ):
        with world.sessions() as session, pytest.raises(Conflict):
            change(session)


def test_a_person_orders_a_deployment_of_what_passed_the_gate_and_of_nothing_else(world: World) -> None:
    world.artifact(NEW, "verified")
    world.artifact(NEWER, "rejected")
    with world.sessions.begin() as session:
        project = session.get_one(Project, world.project_id)
        rollouts.order(session, project, NEW, BY_ADA)
    with world.sessions() as session:
        [job] = session.scalars(select(Job).where(Job.kind == "deploy"))
        assert job.payload == {
            "project_id": str(world.project_id), "digest": NEW, "run_id": None, "by": "ada", "why": "because",
        }  # fmt: skip
        with pytest.raises(Conflict, match="is rejected"):
            rollouts.order(session, session.get_one(Project, world.project_id), NEWER, BY_ADA)


def counts(world: World) -> int:
    with world.sessions() as session:
        return len(session.scalars(select(RolloutCount.n)).all())
