"""A run's training job with the real trainer process: it learns, it can be stopped, killing it costs nothing."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from sqlalchemy import select

from engine.digest import base_digest, file_digest
from services.errors import InvalidRequest
from services.settings import Settings
from services.store import datasets, failpoints, jobs, runs
from services.store.jobs import JobCancelled, JobFailed, Lease, LostLease
from services.store.models import Artifact, Example, Job, Revision, Run, RunEvent
from tests.curation.world import World
from tests.training.test_launch import revised
from worker.curation.build import build_revision
from worker.training.child import TrainerDied
from worker.training.run import _bodies, train_job
from worker.training.spec import ReferenceRow

QUICK = {"rank": 8, "alpha": 16, "lr": 0.01, "epochs": 10, "batch_size": 8, "max_length": 64}
ENDLESS = QUICK | {"epochs": 100, "batch_size": 1}


def start(world: World, rows: int = 16, **params: object) -> Run:
    """A queued run on a fresh revision."""
    for index in range(rows):
        world.corrected(f"say number {index}", "no", f"the answer is {index}")
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        return runs.start(session, world.project(session), params=QUICK | params, created_by="ada", revision=revision)


def claim(world: World, run: Run) -> Lease:
    assert run.job_id is not None
    lease = jobs.claim(world.sessions, run.job_id, "test", lease_seconds=30, heartbeat_seconds=0.2)
    assert lease is not None
    return lease


def attempt(world: World, run: Run, settings: Settings) -> None:
    with claim(world, run) as lease:
        train_job(lease, settings)


def events(world: World, run_id: UUID, kind: str) -> list[RunEvent]:
    with world.sessions() as session:
        return [event for event in runs.events(session, run_id) if event.kind == kind]


def children() -> list[psutil.Process]:
    """Trainer processes of this test process."""
    return [child for child in psutil.Process().children() if "worker.training.lora" in " ".join(child.cmdline())]


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_run_learns_and_leaves_an_artefact_named_by_its_manifest(world: World, tiny_settings: Settings) -> None:
    run = start(world)

    attempt(world, run, tiny_settings)

    losses = [event.payload["loss"] for event in events(world, run.id, "progress")]
    assert losses[-1] < losses[0] - 0.5
    [confirmed] = [event.payload for event in events(world, run.id, "log") if event.payload.get("name") == "confirmed"]
    assert confirmed["detail"] == {"prompts": 16, "passed_over": 0}
    with world.sessions() as session:
        done = session.get_one(Run, run.id)
        [built] = session.scalars(select(Artifact)).all()
        job = session.get_one(Job, done.job_id)
        revision = session.get_one(Revision, done.revision_id)
    assert (done.state, done.phase, done.artifact_digest) == ("running", "evaluating", built.digest)
    assert (job.kind, job.payload, job.state) == ("evaluate", {"run_id": str(run.id)}, "queued")
    assert done.preflight is not None
    assert done.preflight["rows_trained"] == 16
    directory = tiny_settings.artifacts / built.digest
    assert sorted(path.name for path in directory.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    ]  # fmt: skip
    assert file_digest(directory / "manifest.json") == built.digest
    assert json.loads((directory / "manifest.json").read_text()) == built.manifest
    assert built.manifest["files"] == {name: file_digest(directory / name) for name in built.manifest["files"]}
    assert built.manifest["base"] == built.base_digest == base_digest(tiny_settings.model_path)
    assert built.manifest["revision"] == revision.digest
    assert str(tiny_settings.model_path) not in (directory / "adapter_config.json").read_text()
    assert not (tiny_settings.home / "runs" / str(run.id)).exists()
    assert_peft_loads_it(tiny_settings.model_path, directory)


def assert_peft_loads_it(model: Path, directory: Path) -> None:
    """The trained adapter changes what the base says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, directory)(ids).logits
    assert (before - after).abs().max() > 0.1


def test_a_killed_trainer_and_a_second_attempt_leave_one_artefact(world: World, tiny_settings: Settings) -> None:
    revised(world, "say again number", 20, "keep")
    run = start(world, epochs=60, checkpoint_steps=20, replay=0.3, replay_from="keep")

    def kill() -> None:
        wait_for(lambda: any((event.step or 0) > 24 for event in events(world, run.id, "progress")))
        os.kill(children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with claim(world, run) as lease:
        with pytest.raises(TrainerDied, match="signal 9"):
            train_job(lease, tiny_settings)
        lease.fail("the trainer was killed")
    killer.join()
    with world.sessions.begin() as session:
        session.get_one(Job, run.job_id).not_before = session.get_one(Run, run.id).created_at
    left = tiny_settings.home / "runs" / str(run.id)
    [fence] = left.iterdir()
    assert fence.stat().st_mode & 0o077 == 0

    attempt(world, run, tiny_settings)

    assert all(event.payload["replay"]["drawn"] > 0 for event in events(world, run.id, "preflight"))
    told = [event.payload for event in events(world, run.id, "log") if event.payload.get("name") == "resumed"]
    assert len(told) == 1
    assert told[0]["detail"]["checkpoint"] != "checkpoint-0"
    with world.sessions() as session:
        [built] = session.scalars(select(Artifact)).all()
        assert session.get_one(Run, run.id).artifact_digest == built.digest
    assert [path.name for path in tiny_settings.artifacts.iterdir()] == [built.digest]
    assert not left.exists()


def test_a_worker_that_dies_after_the_rename_leaves_one_artefact_row(
    world: World, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(world)

    def die(name: str) -> None:
        if name == "train.renamed":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, claim(world, run) as lease:
        patch.setattr(failpoints, "reach", die)
        with pytest.raises(KeyboardInterrupt):
            train_job(lease, tiny_settings)
        lease.fail("the worker died")
    with world.sessions.begin() as session:
        session.get_one(Job, run.job_id).not_before = session.get_one(Run, run.id).created_at

    attempt(world, run, tiny_settings)

    with world.sessions() as session:
        [built] = session.scalars(select(Artifact)).all()
    # The same rows, seed and thread count give the same weights, so the second attempt finds the first one's work.
    assert [path.name for path in tiny_settings.artifacts.iterdir()] == [built.digest]


def test_cancelling_ends_the_trainer_and_the_run(world: World, tiny_settings: Settings) -> None:
    run = start(world, **ENDLESS)

    def cancel() -> None:
        wait_for(lambda: events(world, run.id, "progress"))
        with world.sessions.begin() as session:
            runs.request_cancel(session, run.id)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with claim(world, run) as lease, pytest.raises(JobCancelled):
        train_job(lease, tiny_settings)
    canceller.join()

    assert children() == []
    assert not (tiny_settings.home / "runs" / str(run.id)).exists(), "it holds what the run read"
    with world.sessions() as session:
        assert session.get_one(Run, run.id).state == "cancelled"
        assert session.scalars(select(Artifact)).all() == []


def test_a_lost_lease_ends_the_trainer(world: World, tiny_settings: Settings) -> None:
    run = start(world, **ENDLESS)

    def take_away() -> None:
        wait_for(lambda: events(world, run.id, "progress"))
        with world.sessions.begin() as session:
            session.get_one(Job, run.job_id).fence += 1

    thief = threading.Thread(target=take_away)
    thief.start()
    with claim(world, run) as lease, pytest.raises(LostLease):
        train_job(lease, tiny_settings)
    thief.join()

    assert children() == []
    with world.sessions() as session:
        assert session.get_one(Run, run.id).state == "running", "whoever holds the newer fence goes on with it"
        assert session.scalars(select(Artifact)).all() == []


def test_a_trainer_whose_worker_is_killed_dies_with_it(world: World, tiny_settings: Settings) -> None:
    run = start(world, **ENDLESS)
    worker = os.fork()
    if worker == 0:  # a worker process of its own, to be killed like one
        try:
            world.sessions.kw["bind"].dispose(close=False)
            attempt(world, run, tiny_settings)
        finally:
            os._exit(1)
    wait_for(lambda: events(world, run.id, "progress"))
    [trainer] = psutil.Process(worker).children()

    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)

    trainer.wait(timeout=5)
    with world.sessions() as session:
        assert session.scalars(select(Artifact)).all() == []


def test_a_refused_preflight_fails_the_run_before_any_compute(world: World, tiny_settings: Settings) -> None:
    for index in range(4):
        world.corrected(f"say number {index}", "no", "number " * 90)
    run = start(world, rows=4)

    with claim(world, run) as lease, pytest.raises(JobFailed, match="4 of 8 training rows cannot be trained on"):
        train_job(lease, tiny_settings)

    with world.sessions() as session:
        failed = session.get_one(Run, run.id)
    assert failed.state == "failed"
    assert failed.preflight is not None
    assert failed.preflight["refused"] == {"the answer would be truncated": 4}
    [warned] = failed.preflight["warnings"]
    assert warned.startswith("the gate needs held-out corrections of 30 groups and has 0, so it would refuse")
    assert events(world, run.id, "progress") == []
    assert not tiny_settings.artifacts.exists() or not list(tiny_settings.artifacts.iterdir())


def test_a_rank_that_no_slot_of_the_engine_holds_fails_before_any_compute(
    world: World, tiny_settings: Settings
) -> None:
    run = start(world, rows=1, rank=64)

    with claim(world, run) as lease, pytest.raises(JobFailed, match="rank 64 does not fit"):
        train_job(lease, tiny_settings)


def test_more_examples_than_a_statement_has_room_for_find_their_log_rows(world: World) -> None:
    logged = world.log("a prompt")
    with world.sessions() as session:
        assert set(_bodies(session, [Example(interaction_id=logged)] * 65_536)) == {logged}


def test_a_prompt_that_transformers_renders_differently_is_refused_by_the_trainer(
    world: World, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(world, rows=4)
    monkeypatch.setattr(
        "worker.training.run.ReferenceRow",
        lambda messages, ids, *asked: ReferenceRow(messages, ids[:-1], *asked),
    )

    with claim(world, run) as lease, pytest.raises(JobFailed, match="template drift"):
        train_job(lease, tiny_settings)

    with world.sessions() as session:
        assert session.get_one(Run, run.id).state == "failed"


def test_one_unfinished_run_a_project_and_a_dead_one_does_not_block(world: World) -> None:
    run = start(world, rows=1)
    with world.sessions.begin() as session, pytest.raises(runs.Conflict, match="unfinished"):
        runs.start(session, world.project(session), params={}, created_by="bela")

    with world.sessions.begin() as session:
        session.get_one(Job, run.job_id).state = "dead"
    with world.sessions.begin() as session:
        second = runs.start(session, world.project(session), params={}, created_by="bela")

    with world.sessions() as session:
        assert session.get_one(Run, run.id).state == "failed"
        job = session.get_one(Job, second.job_id)
        assert (job.kind, job.payload["run_id"]) == ("dataset.build", str(second.id))
        assert datasets.get(session, world.project_id, "golden").id == second.dataset_id


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rank": 0}, "training parameter rank: Input should be greater than or equal to 1"),
        ({"learning_rate": 1}, "training parameter learning_rate: Extra inputs .*known: rank, alpha, lr"),
        ({"targets": ["lm_head"]}, "training parameter targets"),
        ({"epochs": "many"}, "training parameter epochs"),
        ({"sweep": 1}, "training parameter sweep: .*at least 2 candidates"),
        ({"replay_from": "\x00"}, "training parameter replay_from"),
    ],
)
def test_bad_parameters_are_named_and_leave_no_run(world: World, params: dict[str, object], message: str) -> None:
    with world.sessions.begin() as session, pytest.raises(InvalidRequest, match=message):
        runs.start(session, world.project(session), params=params, created_by="ada")

    with world.sessions() as session:
        assert runs.list_(session, world.project_id) == []


def test_a_queued_run_is_cancelled_at_once(world: World) -> None:
    run = start(world, rows=1)

    with world.sessions.begin() as session:
        runs.request_cancel(session, run.id)

    with world.sessions.begin() as session:
        assert session.get_one(Run, run.id).state == "cancelled"
        with pytest.raises(runs.Conflict, match="over"):
            runs.request_cancel(session, run.id)
