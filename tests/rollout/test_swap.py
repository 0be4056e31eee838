"""Deploying through a real engine: verified before it serves, a person's word respected, safe to kill anywhere."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select, update

from services.settings import Settings
from services.store import deployments, jobs, projects, rollouts
from services.store.jobs import JobCancelled, JobFailed
from services.store.models import Artifact, Deployment, DeploymentEvent, Evaluation, Job, Project
from services.store.rollouts import Decision
from tests.rollout.conftest import PROMPTS, ROOT, EngineUnderTest, World
from worker.rollout.swap import deploy_job

FAILPOINTS = ["begun", "loaded", "staged", "verified", "before_flip", "after_flip"]


@pytest.fixture(scope="module")
def pair(engine: EngineUnderTest) -> tuple[str, str]:
    """Two good adapters; each test has its own database, so each may deploy them anew."""
    first, second = engine.adapter(1), engine.adapter(2)
    engine.load(first)
    engine.load(second)
    return first, second


@pytest.fixture(scope="module")
def spoken(engine: EngineUnderTest, pair: tuple[str, str]) -> dict[str, list[str]]:
    """What each adapter says to the golden prompts."""
    said = {digest: [engine.answer(messages, digest) for messages in PROMPTS] for digest in pair}
    assert said[pair[0]] != said[pair[1]], "the adapters must be told apart by their answers"
    return said


def order(world: World, digest: str, run_id: UUID | None) -> UUID:
    payload = {"project_id": str(world.project_id), "digest": digest, "run_id": str(run_id) if run_id else None}
    with world.sessions.begin() as session:
        return jobs.enqueue(session, "deploy", payload, project_id=world.project_id).id


def attempt(world: World, settings: Settings, job_id: UUID) -> None:
    lease = jobs.claim(world.sessions, job_id, "w")
    assert lease is not None
    with lease:
        deploy_job(lease, settings)


def job_state(world: World, job_id: UUID) -> str:
    with world.sessions() as session:
        return jobs.get(session, job_id).state


def serve(world: World, digest: str) -> int:
    """Make a digest live without an engine; returns the generation."""
    world.artifact(digest, "staged")
    with world.sessions.begin() as session:
        return deployments.flip(
            session, world.project_id, expected_generation=1, digest=digest, actor="test", reason="start"
        ).generation


def active(world: World) -> tuple[str | None, int]:
    with world.sessions() as session:
        deployment = deployments.get(session, world.project_id)
        return deployment.active_digest, deployment.generation


def test_a_promoted_artefact_goes_live_and_ends_its_run(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    old, new = pair
    serve(world, old)
    world.artifact(new, "verified")
    run_id = world.run(new, baseline=old, outputs=spoken[new])
    job_id = order(world, new, run_id)

    attempt(world, settings, job_id)

    assert active(world) == (new, 3)
    assert (world.state(new), world.state(old)) == ("live", "retired")
    assert (world.read_run(run_id).state, world.read_run(run_id).phase) == ("succeeded", "live")
    assert job_state(world, job_id) == "succeeded"
    with world.sessions() as session:
        newest = deployments.events(session, world.project_id)[0]
    assert {name: newest.evidence[name] for name in ("golden_prompts", "differing", "run_id")} == {
        "golden_prompts": 8, "differing": 0, "run_id": str(run_id),
    }  # fmt: skip
    assert newest.evidence["states"] == [[new, "staged", "live"], [old, "live", "retired"]]


def test_an_overridden_refusal_is_not_said_to_have_passed(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    old, new = pair
    serve(world, old)
    world.artifact(new, "verified")
    run_id = world.run(new, baseline=old, outputs=spoken[new])
    with world.sessions.begin() as session:
        refused = session.scalars(select(Evaluation).where(Evaluation.run_id == run_id)).one()
        refused.decision, refused.overridden_by, refused.override_reason = "refuse", "ada", "The metric is wrong."

    attempt(world, settings, order(world, new, run_id))

    with world.sessions() as session:
        newest = deployments.events(session, world.project_id)[0]
    assert newest.reason == f"the gate refused run {run_id}; ada let it through: The metric is wrong."


@pytest.mark.parametrize("mode", ["direct", "canary"])
def test_what_a_person_has_deployed_tells_who_and_why(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]], mode: str
) -> None:
    _, new = pair
    world.artifact(new, "verified")
    world.run(new, outputs=spoken[new])
    with world.sessions.begin() as session:
        project = session.get_one(Project, world.project_id)
        projects.configure(session, project, {"rollout": {"mode": mode}})
        job_id = rollouts.order(session, project, new, Decision("ada", "the desk waits for it", {})).id

    attempt(world, settings, job_id)

    assert job_state(world, job_id) == "succeeded"
    with world.sessions() as session:
        newest = deployments.events(session, world.project_id)[0]
    assert (newest.kind, newest.actor, newest.reason) == (
        "flip" if mode == "direct" else "canary", "ada", "the desk waits for it",
    )  # fmt: skip


def test_answers_that_differ_from_the_record_quarantine_the_artefact(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    old, new = pair
    serve(world, old)
    world.artifact(new, "verified")
    run_id = world.run(new, baseline=old, outputs=spoken[old])
    job_id = order(world, new, run_id)

    with pytest.raises(JobFailed, match="golden prompts came back different"):
        attempt(world, settings, job_id)

    assert active(world) == (old, 2)
    assert (world.state(new), world.state(old)) == ("quarantined", "live")
    assert (world.read_run(run_id).state, world.read_run(run_id).phase) == ("failed", "quarantined")


@pytest.mark.parametrize("damage", ["truncated weights", "another manifest", "no directory"])
def test_a_broken_artefact_is_refused_and_the_old_one_goes_on_serving(
    world: World, settings: Settings, engine: EngineUnderTest, pair: tuple[str, str], spoken: dict[str, list[str]],
    damage: str,
) -> None:  # fmt: skip
    old, _ = pair
    serve(world, old)
    broken = engine.adapter(100 + len(damage))
    directory = engine.artifacts / broken
    if damage == "truncated weights":
        weights = directory / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "another manifest":
        (directory / "manifest.json").write_text(json.dumps({"kind": "adapter"}))
    else:
        directory.rename(engine.artifacts / f"moved-{broken[:8]}")
    world.artifact(broken, "verified")
    run_id = world.run(broken, baseline=old, outputs=spoken[old])

    with pytest.raises(JobFailed, match="the engine refused the artefact"):
        attempt(world, settings, order(world, broken, run_id))

    assert active(world) == (old, 2)
    assert world.state(broken) == "quarantined"
    assert "refused" in (world.read_run(run_id).error or "")
    assert engine.answer(PROMPTS[0], old) == spoken[old][0]


def test_an_artefact_that_was_never_evaluated_does_not_go_live(
    world: World, settings: Settings, pair: tuple[str, str]
) -> None:
    world.artifact(pair[1], "verified")

    with pytest.raises(JobFailed, match="never evaluated"):
        attempt(world, settings, order(world, pair[1], None))
    assert active(world) == (None, 1)


def test_a_roll_back_between_two_attempts_is_respected(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    old, new = pair
    serve(world, old)
    world.artifact(new, "verified")
    run_id = world.run(new, baseline=old, outputs=spoken[new])
    job_id = order(world, new, run_id)
    kill_at(world, job_id, "verified")
    with world.sessions.begin() as session:
        deployments.roll_back(session, world.project_id, actor="ada", reason="looks wrong")

    with pytest.raises(JobFailed, match="moved from generation 2 to 3"):
        attempt(world, settings, job_id)

    assert active(world) == (None, 3)
    assert (world.read_run(run_id).state, world.read_run(run_id).phase) == ("failed", "superseded")
    assert world.state(new) == "staged"


def test_a_freeze_while_it_is_verified_lets_it_wait_and_a_person_goes_on(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    old, new = pair
    serve(world, old)
    world.artifact(new, "verified")
    run_id = world.run(new, baseline=old, outputs=spoken[new])
    job_id = order(world, new, run_id)
    kill_at(world, job_id, "verified")
    with world.sessions.begin() as session:
        session.execute(update(Deployment).values(frozen=True))
    with pytest.raises(JobFailed, match="it waits: promotion is frozen"):
        attempt(world, settings, job_id)
    assert (world.read_run(run_id).state, world.read_run(run_id).phase) == ("succeeded", "verified")
    assert (active(world), world.state(new)) == ((old, 2), "staged")

    with world.sessions.begin() as session:
        deployments.unfreeze(session, world.project_id, actor="ada", reason="the feedback form was broken")
        by_ada = Decision("ada", "it had passed", {})
        by_hand = rollouts.order(session, session.get_one(Project, world.project_id), new, by_ada).id
    attempt(world, settings, by_hand)

    assert active(world) == (new, 3)


def test_a_verdict_against_a_baseline_that_no_longer_serves_is_worth_nothing(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    old, new = pair
    serve(world, old)
    world.artifact(new, "verified")
    run_id = world.run(new, baseline=None, outputs=spoken[new])

    with pytest.raises(JobFailed, match="not its baseline"):
        attempt(world, settings, order(world, new, run_id))
    assert active(world) == (old, 2)


def test_a_cancelled_deployment_changes_nothing(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    world.artifact(pair[1], "verified")
    job_id = order(world, pair[1], world.run(pair[1], outputs=spoken[pair[1]]))
    lease = jobs.claim(world.sessions, job_id, "w")
    assert lease is not None
    with world.sessions.begin() as session:
        jobs.request_cancel(session, job_id)

    with lease, pytest.raises(JobCancelled):
        deploy_job(lease, settings)
    assert active(world) == (None, 1)


def kill_at(world: World, job_id: UUID, failpoint: str) -> None:
    """Run one attempt in a process that dies there, and let its lease run out."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.rollout.deploy", str(job_id)],
        cwd=ROOT, env={**os.environ, "WHET_FAILPOINT": f"deploy.{failpoint}"}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 137, process.stderr.decode()
    with world.sessions.begin() as session:
        session.execute(
            update(Job).where(Job.state == "running").values(lease_expires_at=func.now() - timedelta(seconds=1))
        )
    with world.sessions.begin() as session:
        jobs.expire(session)
        session.execute(update(Job).values(not_before=func.now()))


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_deployment_killed_at_any_point_ends_with_one_live_digest(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]], failpoint: str
) -> None:
    old, new = pair
    serve(world, old)
    world.artifact(new, "verified")
    run_id = world.run(new, baseline=old, outputs=spoken[new])
    job_id = order(world, new, run_id)

    kill_at(world, job_id, failpoint)
    if failpoint == "after_flip":
        assert job_state(world, job_id) == "succeeded"
    else:
        assert active(world) == (old, 2), "nothing may change before the flip commits"
        attempt(world, settings, job_id)

    assert active(world) == (new, 3)
    with world.sessions() as session:
        assert session.scalars(select(Artifact.digest).where(Artifact.state == "live")).all() == [new]
        kinds = session.scalars(select(DeploymentEvent.kind).order_by(DeploymentEvent.id)).all()
    assert kinds == ["flip", "staged", "flip"]
    assert world.read_run(run_id).phase == "live"


def test_a_deploy_job_for_what_already_serves_only_ends_its_run(
    world: World, settings: Settings, pair: tuple[str, str], spoken: dict[str, list[str]]
) -> None:
    serve(world, pair[1])
    run_id = world.run(pair[1], outputs=spoken[pair[1]])

    attempt(world, settings, order(world, pair[1], run_id))

    assert active(world) == (pair[1], 2)
    assert world.read_run(run_id).state == "succeeded"
