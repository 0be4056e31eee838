"""A speculator run's training job: what of the log it reads, what it leaves, and what no kill can spoil."""

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
from engine.messages import Sampling
from engine.offline import LocalEngine
from engine.text.tokenizer import Tokenizer
from services.errors import Conflict, InvalidRequest
from services.settings import Settings
from services.store import failpoints, jobs, projects, runs, traffic
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import Artifact, ErasureRequest, Job, Run, RunEvent
from services.store.traffic import Size
from tests.curation.world import World
from worker.gate import speculator
from worker.training import attempt as attempt_module
from worker.training.child import TrainerDied
from worker.training.choosing import split
from worker.training.speculator import choose_rows, speculator_job

QUICK = {"heads": 2, "vocabulary": 64, "epochs": 2, "min_requests": 60}


@pytest.fixture(scope="module")
def answers(tiny_model: Path) -> list[tuple[list[int], list[int]]]:
    """What the tiny model says to some prompts, greedily."""
    tokenizer = Tokenizer.load(tiny_model)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": f"say number {index}"}]) for index in range(64)]
    with LocalEngine(tiny_model, precision="fp32", threads=1, speculation=False) as engine:
        done = engine.generate(prompts, Sampling(temperature=0.0, seed=0, max_tokens=16))
    return [(prompt, answer.token_ids) for prompt, answer in zip(prompts, done, strict=True)]


@pytest.fixture
def log(world: World, tiny_model: Path, answers: list[tuple[list[int], list[int]]]) -> Callable[..., list[UUID]]:
    """Write the answers into the log as the model's live traffic, or as something else."""
    tokenizer = Tokenizer.load(tiny_model)

    def write(count: int = 64, **changes: object) -> list[UUID]:
        made = []
        for index, (prompt, answer) in enumerate(answers[:count]):
            fields: dict[str, object] = {
                "prompt_token_ids": prompt, "token_ids": answer, "prompt_tokens": len(prompt),
                "completion_tokens": len(answer), "tokenizer_hash": tokenizer.digest,
                "template_hash": tokenizer.template_digest, "base_digest": base_digest(tiny_model),
                "parameters": {"temperature": 0.0, "seed": 1, "n": 1},
            }  # fmt: skip
            made.append(world.log(f"p{index}", **(fields | changes)))  # type: ignore[arg-type]
        return made

    return write


def start(world: World, **params: object) -> Run:
    with world.sessions.begin() as session:
        return runs.start(
            session, world.project(session), params={**QUICK, **params}, created_by="ada", kind="speculator"
        )


def claim(world: World, run: Run) -> Lease:
    assert run.job_id is not None
    lease = jobs.claim(world.sessions, run.job_id, "test", lease_seconds=30, heartbeat_seconds=0.2)
    assert lease is not None
    return lease


def attempt(world: World, run: Run, settings: Settings) -> None:
    with claim(world, run) as lease:
        speculator_job(lease, settings)
        if not lease.ended():
            lease.succeed()


def again(world: World, run: Run) -> None:
    """Do not wait for the pause before the next attempt."""
    with world.sessions.begin() as session:
        session.get_one(Job, run.job_id).not_before = session.get_one(Run, run.id).created_at


def events(world: World, run_id: UUID, kind: str) -> list[RunEvent]:
    with world.sessions() as session:
        return [event for event in runs.events(session, run_id) if event.kind == kind]


def readable(world: World, model: Path, project_id: UUID | None = None) -> set[UUID]:
    tokenizer = Tokenizer.load(model)
    with world.sessions() as session:
        rows = traffic.sizes(
            session, project_id or world.project_id, tokenizer=tokenizer.digest, template=tokenizer.template_digest,
            base=base_digest(model),
        )  # fmt: skip
    return {row.id for row in rows}


def test_a_run_reads_the_log_and_hands_heads_to_the_gate(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]]
) -> None:
    log()
    run = start(world)

    attempt(world, run, tiny_settings)

    with world.sessions() as session:
        done = session.get_one(Run, run.id)
        [built] = session.scalars(select(Artifact)).all()
        job = session.get_one(Job, done.job_id)
    assert (done.state, done.phase, done.artifact_digest) == ("running", "judging", built.digest)
    assert (job.kind, job.payload) == ("evaluate.speculator", {"run_id": str(run.id)})
    assert (built.kind, built.state, built.project_id) == ("speculator", "built", world.project_id)
    directory = tiny_settings.artifacts / built.digest
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "speculator.safetensors"]
    assert file_digest(directory / "manifest.json") == built.digest
    manifest = built.manifest
    assert manifest["vocabulary"] == file_digest(tiny_settings.model_path / "tokenizer.json")
    assert (manifest["adapter"], manifest["base"]) == (None, base_digest(tiny_settings.model_path))
    assert (manifest["shape"]["heads"], manifest["shape"]["vocabulary"]) == (2, 64)
    assert manifest["window"]["interactions"] == 64
    assert manifest["window"]["first"] <= manifest["window"]["last"]
    assert {"step", "steps", "loss", "tau", "tokens_per_second", "eta"} <= events(world, run.id, "progress")[
        0
    ].payload.keys()
    [held] = events(world, run.id, "held_out")
    assert held.payload["survival"]["incumbent"] is None
    assert all(1 <= row["candidate"] <= 3 for row in held.payload["held_out"])
    assert not (tiny_settings.home / "runs" / str(run.id)).exists()


def test_only_complete_live_answers_of_this_model_tokenizer_template_and_project_are_read(
    world: World, tiny_model: Path, log: Callable[..., list[UUID]]
) -> None:
    with world.sessions.begin() as session:
        other = projects.create(session, "other").id
    mine = log(2)
    theirs = log(2, project_id=other)
    for strange in (
        {"origin": "shadow"}, {"origin": "pinned"}, {"tokenizer_hash": "x"}, {"template_hash": "x"},
        {"base_digest": "x"}, {"finish_reason": "cancelled"}, {"completion_tokens": 1},
        {"parameters": {"n": 2, "temperature": 1.0, "seed": 1}},
    ):  # fmt: skip
        log(2, **strange)

    assert readable(world, tiny_model) == set(mine)
    assert readable(world, tiny_model, other) == set(theirs)
    with world.sessions() as session:
        asked = [*theirs, *mine]
        assert [row.id for row in traffic.answers(session, world.project_id, asked)] == mine


def test_whoever_asked_to_be_erased_is_not_learned_from(
    world: World, tiny_model: Path, log: Callable[..., list[UUID]]
) -> None:
    kept = log(2, end_user="u1", session_key="s1")
    log(2, end_user="u2")
    log(2, session_key="s2")
    with world.sessions.begin() as session:
        session.add(ErasureRequest(project_id=world.project_id, subject="u2"))
        session.add(ErasureRequest(project_id=None, subject="s2"))
        other = projects.create(session, "other").id
        session.add(ErasureRequest(project_id=other, subject="u1"))

    assert readable(world, tiny_model) == set(kept)


def test_too_little_traffic_refuses_the_run_in_words_before_any_compute(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]]
) -> None:
    log(8)
    run = start(world)

    attempt(world, run, tiny_settings)

    with world.sessions() as session:
        done = session.get_one(Run, run.id)
        assert session.scalars(select(Artifact)).all() == []
    assert (done.state, done.phase) == ("succeeded", "refused")
    assert done.error is not None
    assert "8 live requests can be learned from" in done.error
    assert "heads need 60" in done.error


def test_words_that_no_slot_holds_fail_the_run_before_any_compute(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log()
    run = start(world, vocabulary=64)
    monkeypatch.setattr(attempt_module, "run_trainer", lambda *_: pytest.fail("computed"))

    with pytest.raises(JobFailed, match="64 words do not fit the engine's slots of 32"):
        attempt(world, run, tiny_settings.model_copy(update={"speculator_vocabulary": 32}))

    with world.sessions() as session:
        assert session.get_one(Run, run.id).phase == "failed"


def test_rows_without_token_ids_refuse_the_run(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]]
) -> None:
    log(64, token_ids=[])
    run = start(world)

    attempt(world, run, tiny_settings)

    with world.sessions() as session:
        assert "only 0 of the log's requests hold the token ids" in str(session.get_one(Run, run.id).error)
    assert not list(tiny_settings.home.glob("runs/**/rows.jsonl"))


def test_a_failed_run_leaves_no_copy_of_the_log(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log()
    run = start(world)

    def fail(*_: object) -> None:
        assert list(tiny_settings.home.glob("runs/**/rows.jsonl"))
        raise JobFailed("no memory")

    monkeypatch.setattr(attempt_module, "run_trainer", fail)
    with pytest.raises(JobFailed):
        attempt(world, run, tiny_settings)

    assert not list(tiny_settings.home.glob("runs/**/rows.jsonl"))


def test_a_killed_trainer_and_a_second_attempt_leave_one_artefact(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]]
) -> None:
    log()
    run = start(world, epochs=30, heads=4)

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not events(world, run.id, "progress"):
            assert time.monotonic() < deadline, "the trainer never began"
            time.sleep(0.05)
        [trainer] = [c for c in psutil.Process().children() if "worker.training.heads" in " ".join(c.cmdline())]
        os.kill(trainer.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with claim(world, run) as lease:
        with pytest.raises(TrainerDied, match="signal 9"):
            speculator_job(lease, tiny_settings)
        lease.fail("the trainer was killed")
    killer.join()
    again(world, run)

    attempt(world, run, tiny_settings)

    with world.sessions() as session:
        [built] = session.scalars(select(Artifact)).all()
        assert session.get_one(Run, run.id).artifact_digest == built.digest
    assert [path.name for path in tiny_settings.artifacts.iterdir()] == [built.digest]


def test_a_worker_that_dies_after_the_rename_leaves_one_artefact(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log()
    run = start(world)

    def die(name: str) -> None:
        if name == "speculator.renamed":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, claim(world, run) as lease:
        patch.setattr(failpoints, "reach", die)
        with pytest.raises(KeyboardInterrupt):
            speculator_job(lease, tiny_settings)
        lease.fail("the worker died")
    again(world, run)

    attempt(world, run, tiny_settings)

    with world.sessions() as session:
        [built] = session.scalars(select(Artifact)).all()
    assert [path.name for path in tiny_settings.artifacts.iterdir()] == [built.digest]


def test_cancelling_ends_the_trainer_and_the_run(
    world: World, tiny_settings: Settings, log: Callable[..., list[UUID]]
) -> None:
    log()
    run = start(world)
    with world.sessions.begin() as session:
        lease = claim(world, run)
        runs.request_cancel(session, run.id)

    with lease, pytest.raises(JobCancelled):
        speculator_job(lease, tiny_settings)

    with world.sessions() as session:
        assert session.get_one(Run, run.id).state == "cancelled"
        assert session.scalars(select(Artifact)).all() == []


def test_parameters_are_checked_and_one_run_of_heads_goes_beside_one_of_an_adapter(world: World) -> None:
    with world.sessions.begin() as session:
        project = world.project(session)
        for params, said in (({"heads": 0}, "heads"), ({"rank": 8}, "known: heads, vocabulary")):
            with pytest.raises(InvalidRequest, match=said):
                runs.start(session, project, params=params, created_by="ada", kind="speculator")
        runs.start(session, project, params={}, created_by="ada")
        made = runs.start(session, project, params={"heads": 8}, created_by="ada", kind="speculator")
        assert (made.params["heads"], made.params["vocabulary"], made.dataset_id) == (8, 1024, None)
        with pytest.raises(Conflict, match="unfinished"):
            runs.start(session, project, params={}, created_by="ada", kind="speculator")


def test_answers_of_the_adapter_being_served_come_first_and_stand_last() -> None:
    rows = [Size(UUID(int=i), 10, "old" if i % 2 else "now") for i in range(200)]

    chosen = choose_rows(rows, "now", 1030, 0)

    assert [row.adapter for row in chosen] == ["old"] * 3 + ["now"] * 100
    assert [row.id.int for row in chosen[:3]] == [195, 197, 199]  # the newest of the others fill up


def test_what_is_read_keeps_to_the_budget_and_long_prompts_still_leave_enough_to_judge_by() -> None:
    short = [Size(UUID(int=i), 10, "old" if i % 2 else "now") for i in range(800)]
    chosen = choose_rows(short, "now", 2000, 0)
    assert sum(row.tokens for row in chosen) <= 2000
    assert {row.adapter for row in chosen} == {"now"}

    long = [Size(UUID(int=i), 100_000, "now") for i in range(500)]
    parts = split(len(choose_rows(long, "now", 250_000, 0)))
    assert len(parts.judge) >= speculator.LEAST_REQUESTS
    assert len(parts.stop) >= 10
