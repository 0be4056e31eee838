"""Heads on their way into a real engine: loaded, tried, or refused with the reason while what drafted goes on."""

import os
import subprocess
import sys
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from structlog.testing import capture_logs

from engine.client import EngineRefused
from engine.sync_client import SyncEngineClient
from services.settings import Settings
from services.store import jobs, projects
from services.store.jobs import JobCancelled, JobFailed
from services.store.models import Artifact, Job, Project, Run
from services.store.speculation import Heads
from tests.engine.speculators import random_speculator
from tests.rollout.conftest import ROOT, EngineUnderTest, World
from tests.rollout.drafters import drafting, go_live, heads, history, serve
from worker.rollout.speculator import deploy_speculator_job

A = "a" * 64
# More than the slots of the engine under test hold.
TOO_MANY = 9
QUESTION = [{"role": "user", "content": "w8 w15 w24"}]


def built(world: World, engine: EngineUnderTest, seed: int, *, adapter: str | None = None) -> str:
    """Random heads in the artefact root, with their row."""
    digest = random_speculator(engine.artifacts, engine.model, adapter=adapter, seed=seed)
    return heads(world, digest, adapter=adapter, base=engine.base)


def order(world: World, digest: str) -> tuple[UUID, UUID]:
    """A run that has passed its gate, and its job."""
    with world.sessions.begin() as session:
        run = Run(
            project_id=world.project_id, kind="speculator", state="running", phase="deploying", params={},
            artifact_digest=digest, created_by="test",
        )  # fmt: skip
        session.add(run)
        session.flush()
        payload = {"project_id": str(world.project_id), "digest": digest, "run_id": str(run.id)}
        return run.id, jobs.enqueue(session, "deploy.speculator", payload, project_id=world.project_id).id


def deploy(world: World, settings: Settings, digest: str) -> Run:
    """One attempt; the run afterwards."""
    run_id, job_id = order(world, digest)
    attempt(world, settings, job_id)
    return world.read_run(run_id)


def attempt(world: World, settings: Settings, job_id: UUID) -> None:
    lease = jobs.claim(world.sessions, job_id, "test")
    assert lease is not None
    with lease:
        deploy_speculator_job(lease, settings)


def loaded(engine: EngineUnderTest) -> dict[str, str | None]:
    """The heads in the engine, and whose states they read."""
    with SyncEngineClient(engine.socket) as client:
        return {slot.digest: slot.adapter for slot in client.status().speculators}


def configure(world: World, **speculation: object) -> None:
    with world.sessions.begin() as session:
        projects.configure(session, session.get_one(Project, world.project_id), {"speculation": speculation})


def test_heads_are_loaded_and_tried_on_the_projects_share(
    world: World, engine: EngineUnderTest, settings: Settings
) -> None:
    configure(world, canary_share=0.1)
    digest = built(world, engine, 1)

    run = deploy(world, settings, digest)

    assert (run.state, run.phase) == ("succeeded", "canary")
    assert drafting(world) == Heads(None, digest, 0.1)
    assert loaded(engine)[digest] is None
    event = history(world)[-1]
    assert (event.kind, event.actor, event.evidence) == (
        "speculator_canary", "rollout", {"run_id": str(run.id), "share": 0.1},
    )  # fmt: skip
    with world.sessions() as session:
        assert session.scalars(select(Job.state)).all() == ["succeeded"]


def test_without_a_trial_heads_are_live_at_once(world: World, engine: EngineUnderTest, settings: Settings) -> None:
    configure(world, canary_share=0)
    adapter = "c" * 64
    serve(world, adapter)
    digest = built(world, engine, 2, adapter=adapter)

    run = deploy(world, settings, digest)

    assert (run.state, run.phase, drafting(world)) == ("succeeded", "live", Heads(digest))
    assert loaded(engine)[digest] == adapter


def test_a_corrupt_file_is_quarantined_with_the_reason_and_what_drafts_goes_on(
    world: World, engine: EngineUnderTest, settings: Settings
) -> None:
    good, bad = built(world, engine, 3), built(world, engine, 4)
    go_live(world, good)
    said = engine.answer(QUESTION, None)
    damage(engine, bad)
    run_id, job_id = order(world, bad)

    with pytest.raises(JobFailed, match="the engine refused the heads"):
        attempt(world, settings, job_id)

    run = world.read_run(run_id)
    assert (run.state, run.phase, world.state(bad)) == ("failed", "quarantined", "quarantined")
    assert run.error is not None
    assert "refused the heads" in run.error
    assert drafting(world) == Heads(good)
    assert engine.answer(QUESTION, None) == said
    _, again = order(world, bad)
    with pytest.raises(JobFailed, match="are quarantined"):
        attempt(world, settings, again)


def damage(engine: EngineUnderTest, digest: str) -> None:
    file = engine.artifacts / digest / "speculator.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("reason", ["another adapter", "another project", "switched off"])
def test_heads_that_fit_no_more_are_superseded_and_keep_their_state(
    world: World, engine: EngineUnderTest, settings: Settings, reason: str
) -> None:
    digest = built(world, engine, {"another adapter": 5, "another project": 6, "switched off": 7}[reason])
    sentence = {
        "another adapter": "aaaaaaaaaaaa serves now",
        "another project": "does not belong",
        "switched off": "off",
    }
    if reason == "another adapter":
        serve(world, A)
    elif reason == "switched off":
        configure(world, enabled=False)
    run_id, job_id = order(world, digest)
    if reason == "another project":
        with world.sessions.begin() as session:
            other = projects.create(session, "other").id
            session.get_one(Artifact, digest).project_id = other

    with pytest.raises(JobFailed, match=sentence[reason]):
        attempt(world, settings, job_id)

    assert (world.read_run(run_id).phase, world.state(digest)) == ("superseded", "built")
    assert digest not in loaded(engine)


def test_an_engine_that_answers_with_other_heads_is_not_believed(
    world: World, engine: EngineUnderTest, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = built(world, engine, 8)
    run_id, job_id = order(world, digest)
    monkeypatch.setattr(SyncEngineClient, "load_speculator", lambda *_: "f" * 64)

    with capture_logs() as lines, pytest.raises(RuntimeError, match="answered with heads ffffffffffff"):
        attempt(world, settings, job_id)

    assert [line["serving"] for line in lines if line.get("alarm")] == ["f" * 64]
    assert (drafting(world), world.state(digest), world.read_run(run_id).state) == (Heads(), "built", "running")


def test_what_the_engine_could_not_do_just_now_condemns_nothing(
    world: World, engine: EngineUnderTest, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = built(world, engine, 9)

    def refuse(*_: object) -> str:
        raise EngineRefused("the disk is slow", transient=True)

    monkeypatch.setattr(SyncEngineClient, "load_speculator", refuse)
    with pytest.raises(RuntimeError, match="just now: the disk is slow"):
        deploy(world, settings, digest)
    assert world.state(digest) == "built"


def test_heads_without_a_free_slot_push_nobodys_live_heads_out(
    world: World, engine: EngineUnderTest, settings: Settings
) -> None:
    with SyncEngineClient(engine.socket) as client:
        for slot in client.status().speculators:
            client.unload_speculator(slot.digest)
        for number in range(client.status().speculators_total):
            with world.sessions.begin() as session:
                project_id = projects.create(session, f"project-{number}").id
            elsewhere = World(world.sessions, project_id, world.revision_id, [])
            digest = built(elsewhere, engine, 30 + number)
            go_live(elsewhere, digest)
            client.load_speculator(digest, str(engine.artifacts / digest))
    before, digest = loaded(engine), built(world, engine, 40)
    run_id, job_id = order(world, digest)

    with pytest.raises(JobFailed, match="raise WHET_SPECULATOR_SLOTS"):
        attempt(world, settings, job_id)

    assert loaded(engine) == before
    assert (world.read_run(run_id).phase, world.state(digest)) == ("superseded", "built")


def test_heads_too_large_for_this_engines_slots_are_not_condemned(
    world: World, engine: EngineUnderTest, settings: Settings
) -> None:
    digest = random_speculator(engine.artifacts, engine.model, heads=TOO_MANY, seed=15)
    heads(world, digest, base=engine.base)
    run_id, job_id = order(world, digest)

    with pytest.raises(JobFailed, match=r"fit no slot of this engine.*raise --speculator-heads"):
        attempt(world, settings, job_id)

    assert (world.read_run(run_id).phase, world.state(digest)) == ("superseded", "built")


@pytest.mark.parametrize("point", ["begun", "loaded", "released"])
def test_a_deployment_killed_anywhere_is_finished_by_the_next_attempt(
    world: World, engine: EngineUnderTest, settings: Settings, point: str
) -> None:
    digest = built(world, engine, {"begun": 10, "loaded": 11, "released": 12}[point])
    run_id, job_id = order(world, digest)
    kill_at(world, job_id, point)
    if point != "released":
        assert drafting(world) == Heads(), "nothing may change before the transaction that tries them"
        attempt(world, settings, job_id)

    assert drafting(world).canary == digest
    assert [event.kind for event in history(world)] == ["speculator_canary"]
    assert world.read_run(run_id).state == "succeeded"


def kill_at(world: World, job_id: UUID, point: str) -> None:
    """Run one attempt in a process that dies there, and let its lease run out."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.rollout.deploy", str(job_id)], cwd=ROOT, capture_output=True, timeout=60,
        env={**os.environ, "WHET_FAILPOINT": f"deploy_speculator.{point}"},
    )  # fmt: skip
    assert process.returncode == 137, process.stderr.decode()
    with world.sessions.begin() as session:
        session.execute(
            update(Job).where(Job.state == "running").values(lease_expires_at=func.now() - timedelta(seconds=1))
        )
    with world.sessions.begin() as session:
        jobs.expire(session)
        session.execute(update(Job).values(not_before=func.now()))


def test_a_cancelled_deployment_changes_nothing(world: World, engine: EngineUnderTest, settings: Settings) -> None:
    run_id, job_id = order(world, built(world, engine, 13))
    lease = jobs.claim(world.sessions, job_id, "w")
    assert lease is not None
    with world.sessions.begin() as session:
        jobs.request_cancel(session, job_id)
    with lease, pytest.raises(JobCancelled):
        deploy_speculator_job(lease, settings)
    assert (drafting(world), world.read_run(run_id).state) == (Heads(), "cancelled")


def test_heads_that_draft_already_only_end_their_run(world: World, engine: EngineUnderTest, settings: Settings) -> None:
    digest = built(world, engine, 14)
    go_live(world, digest)
    run = deploy(world, settings, digest)
    assert (run.state, drafting(world), len(history(world))) == ("succeeded", Heads(digest), 1)
