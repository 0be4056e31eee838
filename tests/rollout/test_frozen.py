"""A candidate that passes while promotion is frozen: it waits in the state it has, and a person goes on from there."""

from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select, update

from services.settings import Settings
from services.store import deployments, jobs, rollouts
from services.store.jobs import JobFailed
from services.store.models import Deployment, Evaluation, Project, RunEvent
from services.store.rollout_config import RolloutConfig
from tests.rollout.conftest import World
from tests.rollout.trials import BY_ADA
from worker.rollout.swap import deploy_job

NEW = "a" * 64
WAITS = "it waits: promotion is frozen after automatic roll-backs: a person has to look first"


@pytest.fixture
def no_engine(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that name no engine: nothing may be asked of one."""
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", database_url)
    return Settings()


@pytest.fixture
def run_id(world: World) -> UUID:
    world.artifact(NEW, "verified")
    with world.sessions.begin() as session:
        session.execute(update(Deployment).values(frozen=True))
    return world.run(NEW, outputs=["w1"])


def deploy(world: World, settings: Settings, run_id: UUID) -> None:
    payload = {"project_id": str(world.project_id), "digest": NEW, "run_id": str(run_id)}
    with world.sessions.begin() as session:
        job_id = jobs.enqueue(session, "deploy", payload, project_id=world.project_id).id
    lease = jobs.claim(world.sessions, job_id, "w")
    assert lease is not None
    with lease, pytest.raises(JobFailed, match="it waits: promotion is frozen"):
        deploy_job(lease, settings)


def test_its_run_has_succeeded_and_says_what_it_waits_for(world: World, no_engine: Settings, run_id: UUID) -> None:
    deploy(world, no_engine, run_id)

    run = world.read_run(run_id)
    assert (run.state, run.phase) == ("succeeded", "verified")
    assert run.error == f"the candidate passed the gate; {WAITS}"
    assert world.state(NEW) == "verified"
    with world.sessions() as session:
        assert deployments.get(session, world.project_id).active_digest is None


def test_one_that_a_person_let_through_is_not_said_to_have_passed(
    world: World, no_engine: Settings, run_id: UUID
) -> None:
    with world.sessions.begin() as session:
        refused = session.scalars(select(Evaluation).where(Evaluation.run_id == run_id)).one()
        refused.decision, refused.overridden_by, refused.override_reason = "refuse", "ada", "The metric is wrong."

    deploy(world, no_engine, run_id)

    said = "the gate refused the candidate; ada let it through: The metric is wrong"
    assert world.read_run(run_id).error == f"{said}; {WAITS}"


def test_a_person_starts_it_by_hand_once_somebody_has_looked(world: World, no_engine: Settings, run_id: UUID) -> None:
    deploy(world, no_engine, run_id)

    with world.sessions.begin() as session:
        assert deployments.is_frozen(session, world.project_id)
        deployments.unfreeze(session, world.project_id, actor="ada", reason="the feedback form was broken")
        assert not deployments.is_frozen(session, world.project_id)
        job = rollouts.order(session, session.get_one(Project, world.project_id), NEW, BY_ADA)
        assert (job.kind, job.payload["digest"]) == ("deploy", NEW)
        # As that job goes on, once the engine has answered.
        deployments.advance(session, NEW, "staged")
        rollouts.begin(session, world.project_id, NEW, RolloutConfig(), BY_ADA, run_id)

    run = world.read_run(run_id)
    assert (run.state, run.phase, run.error) == ("succeeded", "canary", None)
    with world.sessions() as session:
        told = select(RunEvent.payload).where(RunEvent.run_id == run_id, RunEvent.kind == "phase").order_by(RunEvent.id)
        assert [one["phase"] for one in session.scalars(told)] == ["verified", "canary"]
