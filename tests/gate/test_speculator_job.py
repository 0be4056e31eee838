"""The "evaluate.speculator" job on the ledger: what a promotion and a refusal leave behind."""

from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import UUID

import pytest

from engine.client import EngineGone
from engine.messages import StepCost
from services.settings import Settings
from services.store import jobs, runs
from services.store.base import Sessions
from services.store.jobs import JobCancelled, JobFailed, JobWaits, Lease
from services.store.models import Artifact, Job, Run
from tests.curation.world import World, make_world
from tests.gate.test_speculator_gate import measured
from worker.gate import speculator_job
from worker.gate.speculator_job import evaluate_speculator_job

DIGEST = "d" * 64


class Answer(NamedTuple):
    costs: list[StepCost]


class FakeEngine:
    """An engine of which only the table of costs is asked."""

    def __init__(self, address: str, *, connect_seconds: float) -> None:
        assert address.startswith("ipc://")
        assert connect_seconds > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        return

    def status(self) -> Answer:
        return Answer([StepCost(rows=1, tokens=n, context=512, milliseconds=1 + n / 100) for n in (1, 16, 64)])


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculator_job, "SyncEngineClient", FakeEngine)


@pytest.fixture
def world(sessions: Sessions) -> World:
    return make_world(sessions)


def trained(world: World, report: dict[str, Any] | None) -> UUID:
    """A run whose training is over, and the job that judges it."""
    with world.sessions.begin() as session:
        run = Run(project_id=world.project_id, kind="speculator", params={}, created_by="ada", state="running")
        session.add(run)
        session.flush()
        manifest = {"kind": "speculator"}
        session.add(
            Artifact(
                digest=DIGEST, kind="speculator", project_id=world.project_id, run_id=run.id, base_digest="b",
                manifest=manifest, state="built",
            )
        )  # fmt: skip
        session.flush()
        run.artifact_digest = DIGEST
        if report is not None:
            runs.add_event(session, run.id, "held_out", report)
        runs.hand_over(session, run, "evaluate.speculator", {"run_id": str(run.id)})
        return run.id


def claim(world: World, run_id: UUID) -> Lease:
    with world.sessions() as session:
        job_id = session.get_one(Run, run_id).job_id
    assert job_id is not None
    lease = jobs.claim(world.sessions, job_id, "test")
    assert lease is not None
    return lease


def after(world: World, run_id: UUID) -> tuple[Run, Artifact, Job]:
    with world.sessions() as session:
        run = session.get_one(Run, run_id)
        return run, session.get_one(Artifact, DIGEST), session.get_one(Job, run.job_id)


def test_heads_that_pass_are_handed_to_the_rollout(world: World, settings: Settings) -> None:
    run_id = trained(world, measured(incumbent=True))

    with claim(world, run_id) as lease:
        evaluate_speculator_job(lease, settings)

    run, heads, job = after(world, run_id)
    assert (run.state, run.phase, heads.state) == ("running", "deploying", "verified")
    assert job.kind == "deploy.speculator"
    assert job.payload == {"project_id": str(world.project_id), "digest": DIGEST, "run_id": str(run_id)}
    with world.sessions() as session:
        [gate] = [event.payload for event in runs.events(session, run_id) if event.kind == "gate"]
    assert gate["decision"] == "promote"
    assert gate["goodput_16"] >= gate["incumbent_goodput_16"]


def test_heads_that_do_not_are_rejected_with_the_reason_on_the_run(world: World, settings: Settings) -> None:
    report = measured(incumbent=True)
    for row in report["held_out"]:
        row["candidate"], row["incumbent"] = row["incumbent"], row["candidate"]
    run_id = trained(world, report)

    with claim(world, run_id) as lease:
        evaluate_speculator_job(lease, settings)

    run, heads, job = after(world, run_id)
    assert (run.state, run.phase, heads.state) == ("succeeded", "refused", "rejected")
    assert (job.kind, job.state) == ("evaluate.speculator", "succeeded")
    with world.sessions() as session:
        [gate] = [event.payload for event in runs.events(session, run_id) if event.kind == "gate"]
    assert gate["decision"] == "refuse"
    assert "not shown to yield more" in gate["reasons"][0]


def test_a_run_without_measurements_fails(world: World, settings: Settings) -> None:
    run_id = trained(world, None)

    with claim(world, run_id) as lease, pytest.raises(JobFailed, match="no heads to judge"):
        evaluate_speculator_job(lease, settings)

    assert after(world, run_id)[0].state == "failed"


def test_heads_wait_for_an_engine_that_is_away(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_engine: FakeEngine) -> Answer:
        raise EngineGone("not there")

    monkeypatch.setattr(FakeEngine, "status", gone)
    run_id = trained(world, measured(incumbent=True))

    with claim(world, run_id) as lease, pytest.raises(JobWaits, match="not there"):
        evaluate_speculator_job(lease, settings)

    run, heads, _ = after(world, run_id)
    assert (run.state, heads.state) == ("running", "built")


def test_a_cancelled_run_is_not_decided(world: World, settings: Settings) -> None:
    run_id = trained(world, measured(incumbent=False))
    lease = claim(world, run_id)
    with world.sessions.begin() as session:
        runs.request_cancel(session, run_id)

    with lease, pytest.raises(JobCancelled):
        evaluate_speculator_job(lease, settings)

    run, heads, _ = after(world, run_id)
    assert (run.state, heads.state) == ("cancelled", "built")
