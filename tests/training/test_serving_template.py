"""Does the trainer render as the serving side does? From the log to the run's end, by name and before any compute."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import func, update

from engine.digest import base_digest
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import engine_reports, jobs, runs
from services.store.engine_reports import Report
from services.store.jobs import JobFailed
from services.store.models import Artifact, EngineReport
from tests.curation.world import World
from tests.training.tiny import TEMPLATE, make_model
from worker.curation.build import build_revision
from worker.gate import evaluate
from worker.training import attempt as attempt_module
from worker.training.run import train_job

DRIFT = "template drift: another chat template than the trainer's rendered what was served last"
QUICK = {"max_steps": 1}


class Trained(Exception):
    """The trainer would start now."""


@pytest.fixture
def serve(world: World, tiny_settings: Settings) -> Callable[..., None]:
    """Log one live answer of the serving side, by default as the trainer would have rendered it. The trainer's files
    have come to lie here just now, and one engine has run for an hour."""
    with world.sessions.begin() as session:
        engine_reports.put(session, "engine", 1, [Report(world.project_id, 1, ())])
        session.execute(update(EngineReport).values(changed_at=func.now() - timedelta(hours=1)))
    (tiny_settings.model_path / "tokenizer.json").touch()
    tokenizer = Tokenizer.load(tiny_settings.model_path)
    base = base_digest(tiny_settings.model_path)

    def log(seconds_ago: float = 0.0, **changes: object) -> None:
        hashes = {"tokenizer_hash": tokenizer.digest, "template_hash": tokenizer.template_digest}
        at = datetime.now(UTC) + timedelta(seconds=1 - seconds_ago)
        world.log("asked", at=at, **({"base_digest": base} | hashes | changes))  # type: ignore[arg-type]

    return log


@pytest.fixture
def train(world: World, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A run's job, up to where the trainer would start. Raises Trained there."""

    def start(*_: object) -> None:
        raise Trained

    monkeypatch.setattr(attempt_module, "run_trainer", start)

    def work() -> None:
        for index in range(16):
            world.corrected(f"say number {index}", "no", f"the answer is {index}")
        with world.sessions.begin() as session:
            revision = build_revision(session, world.project_id, "golden")
            run = runs.start(session, world.project(session), params=QUICK, created_by="ada", revision=revision)
        lease = jobs.claim(world.sessions, run.job_id, "test")  # type: ignore[arg-type]
        assert lease is not None
        with lease:
            train_job(lease, tiny_settings)

    return work


def test_a_trainer_with_another_template_than_serves_is_refused(
    serve: Callable[..., None], train: Callable[[], None]
) -> None:
    serve(0.5)
    serve(template_hash="another")
    with pytest.raises(JobFailed, match=DRIFT):
        train()


def test_the_newest_answer_decides_not_an_older_one(serve: Callable[..., None], train: Callable[[], None]) -> None:
    serve(0.5, template_hash="older")
    serve()
    with pytest.raises(Trained):
        train()


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds_ago": 30.0},
        {"origin": "shadow"},
        {"base_digest": "another"},
    ],
    ids=["before the files were put here", "a copy of an older prompt", "another base model"],
)
def test_what_says_nothing_of_todays_template_refuses_nothing(
    serve: Callable[..., None], train: Callable[[], None], changes: dict[str, object]
) -> None:
    serve(template_hash="another", **changes)
    with pytest.raises(Trained):
        train()


def test_what_was_served_before_the_engine_restarted_refuses_nothing(
    world: World, serve: Callable[..., None], train: Callable[[], None]
) -> None:
    """New files were put in place, the old ones went on serving until the restart, and nobody has asked since."""
    serve(template_hash="another")
    with world.sessions.begin() as session:
        engine_reports.put(session, "engine", 2, [Report(world.project_id, 1, ())])
        session.execute(update(EngineReport).values(changed_at=func.now() + timedelta(seconds=5)))
    with pytest.raises(Trained):
        train()


def test_while_no_engine_is_there_nothing_is_refused(
    world: World, serve: Callable[..., None], train: Callable[[], None]
) -> None:
    """It may be starting with the files that lie here now; the evaluation compares them with its own."""
    serve(template_hash="another")
    with world.sessions.begin() as session:
        session.execute(update(EngineReport).values(seen_at=func.now() - timedelta(minutes=1)))
    with pytest.raises(Trained):
        train()


def test_the_gate_refuses_by_name_what_another_template_taught(
    world: World, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's machine had files of its own, and nothing was served that its preflight could compare with."""
    trainer = make_model(tmp_path / "trainer", template="{{ 'Be brief. ' }}" + TEMPLATE)
    assert base_digest(trainer) == base_digest(tiny_settings.model_path), "the digest of a base knows of no template"
    monkeypatch.setattr(evaluate, "_compare", lambda *_: pytest.fail("asked an engine"))
    run_id = built(world, Tokenizer.load(trainer))

    with pytest.raises(JobFailed, match="template drift: the trainer rendered prompts with other files"):
        work(world, run_id, tiny_settings)

    with world.sessions() as session:
        ended = runs.get(session, run_id)
        assert (ended.state, ended.phase) == ("failed", "failed")
        assert "template drift" in str(ended.error)
        assert session.get_one(Artifact, "a" * 64).state == "built"


def test_the_gate_asks_where_both_render_alike(
    world: World, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(evaluate, "_compare", lambda *_: asked.append(1) or evaluate.Result([], None))

    work(world, built(world, Tokenizer.load(tiny_settings.model_path)), tiny_settings)

    assert asked == [1]


def built(world: World, trainer: Tokenizer) -> UUID:
    """A run whose adapter waits for the gate, with what its trainer's preflight wrote down."""
    world.corrected("say number 1", "no", "the answer is 1")
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        run = runs.start(session, world.project(session), params=QUICK, created_by="ada", revision=revision)
        session.add(
            Artifact(digest="a" * 64, kind="adapter", project_id=world.project_id, base_digest="b", manifest={})
        )
        session.flush()
        run.artifact_digest = "a" * 64
        run.preflight = {"template": {"tokenizer": trainer.digest, "template": trainer.template_digest}}
        runs.hand_over(session, run, "evaluate", {"run_id": str(run.id)})
        return run.id


def work(world: World, run_id: UUID, settings: Settings) -> None:
    with world.sessions() as session:
        job_id = runs.get(session, run_id).job_id
    lease = jobs.claim(world.sessions, job_id, "test")  # type: ignore[arg-type]
    assert lease is not None
    with lease:
        evaluate.evaluate_job(lease, settings)
