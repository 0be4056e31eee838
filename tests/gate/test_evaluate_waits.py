"""An evaluation that cannot run for now: it waits for the engine, and what was trained is not trained again."""

from pathlib import Path
from typing import NamedTuple, cast

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from engine.client import EngineGone
from engine.messages import Slot, SlotState
from engine.sync_client import SyncEngineClient
from services.errors import Conflict
from services.settings import Settings
from services.store import evaluations, leases, runs
from services.store.evaluation_config import MEASURED_BY
from services.store.models import Artifact, Job, Run
from tests.curation.world import World
from tests.gate.conftest import Trained
from tests.gate.test_evaluate import corrected, evaluate, start, state_of
from worker import tasks
from worker.gate import evaluate as evaluating
from worker.gate.order import Order
from worker.gate.score import EngineCrowded


class Table(NamedTuple):
    slots: list[Slot]
    slots_total: int


class Slots:
    """An engine of two slots that are both taken; it remembers what it was told to load."""

    def __init__(self, *references: int, state: SlotState = "ready") -> None:
        self.loaded: list[str] = []
        self._slots = [
            Slot(index=index, digest=f"other {index}", state=state, references=count)
            for index, count in enumerate(references, 1)
        ]

    def status(self) -> Table:
        return Table(self._slots, 2)

    def load_adapter(self, digest: str, _path: str) -> None:
        self.loaded.append(digest)


def load(slots: Slots, settings: Settings, digest: str) -> None:
    evaluating._load(cast("SyncEngineClient", slots), settings, cast("Order", None), digest)


@pytest.fixture
def away(trained: Trained, engine_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings on a home whose engine is not there."""
    assert engine_settings.model_path == trained.model
    monkeypatch.setattr(evaluating, "CONNECT_SECONDS", 0.2)
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    return Settings()


def perform(world: World, run: Run, settings: Settings) -> Job:
    """One attempt, as a worker makes it, now."""
    assert run.job_id is not None
    with world.sessions.begin() as session:
        session.get_one(Job, run.job_id).not_before = func.now()
    tasks.perform(world.sessions, settings, run.job_id)
    with world.sessions() as session:
        return session.get_one(Job, run.job_id)


def test_an_idle_adapter_makes_room_and_one_with_requests_does_not(settings: Settings) -> None:
    idle, busy, leaving = Slots(1, 0), Slots(1, 2), Slots(1, 1, state="draining")

    load(idle, settings, "new")
    load(busy, settings, "other 1")
    for full in (busy, leaving):
        with pytest.raises(EngineCrowded, match="every adapter slot"):
            load(full, settings, "new")

    assert (idle.loaded, busy.loaded, leaving.loaded) == (["new"], ["other 1"], [])


def test_an_engine_that_is_away_is_waited_for_and_costs_no_attempt(
    world: World, trained: Trained, away: Settings
) -> None:
    run = start(world, trained, corrected(31))

    for waits in (1, 2, 3, 4):
        job = perform(world, run, away)
        assert (job.state, job.attempts, job.payload["waits"]) == ("queued", 0, waits)

    with world.sessions() as session:
        pause = session.scalar(select(func.extract("epoch", Job.not_before - func.now())).where(Job.id == run.job_id))
        told = [event.payload["line"] for event in runs.events(session, run.id) if event.kind == "log"]
    assert 10 < float(pause or 0) <= 2**4
    assert len(told) == 4
    assert told[0].startswith("waits for the engine: ")
    assert state_of(world, run.id).state == "running"


def test_an_engine_that_is_lost_on_the_way_costs_attempts(
    world: World, trained: Trained, engine_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(_client: SyncEngineClient, _digest: str, _path: str) -> None:
        raise EngineGone("the engine went away")

    monkeypatch.setattr(SyncEngineClient, "load_adapter", dies)
    run = start(world, trained, corrected(31))

    ends = [perform(world, run, engine_settings) for _ in range(3)]

    assert [(job.state, job.attempts) for job in ends] == [("queued", 1), ("queued", 2), ("dead", 3)]
    assert "waits" not in ends[-1].payload


@pytest.mark.parametrize("first", MEASURED_BY)
def test_a_deciding_metric_that_an_older_release_stored_without_what_it_measures_by_is_told(
    world: World, trained: Trained, settings: Settings, first: str
) -> None:
    run = start(world, trained, corrected(31))
    with world.sessions.begin() as session:
        world.project(session).config = {"metrics": [first]}

    ended = perform(world, run, settings)

    assert (ended.state, ended.attempts) == ("failed", 1)
    assert f"set {MEASURED_BY[first]}, or another metric first" in (ended.error or "")


def test_only_what_another_template_taught_is_trained_again_and_trying_ends(world: World, trained: Trained) -> None:
    run = start(world, trained, corrected(31))

    def end(session: Session, state: str, error: str = "the judge is misconfigured") -> Run:
        mine = session.get_one(Run, run.id)
        assert mine.job_id is not None
        leases.end_job(session, session.get_one(Job, mine.job_id), state, error=error)
        runs.settle(session)
        return mine

    with world.sessions() as session:
        drifted = end(session, "failed", f"{runs.TEMPLATE_DRIFT}other files")
        assert runs.retry(session, drifted, "bela").id != run.id
        session.rollback()
    with world.sessions() as session:
        for _ in range(runs.MOST_RETRIES):
            assert runs.retry(session, end(session, "failed"), "bela").id == run.id
        with pytest.raises(Conflict, match="tried again 3 times"):
            runs.retry(session, end(session, "dead"), "bela")


def test_after_an_hour_in_vain_trying_again_evaluates_what_was_trained(
    world: World, trained: Trained, engine_settings: Settings, away: Settings
) -> None:
    run = start(world, trained, corrected(40))
    assert run.job_id is not None
    with world.sessions.begin() as session:
        job = session.get_one(Job, run.job_id)
        job.payload = {**job.payload, "waits": leases.MOST_WAITS}
    assert perform(world, run, away).state == "failed"
    with world.sessions.begin() as session:
        [failed] = runs.settle(session)
        assert failed.error is not None
        assert failed.error.startswith("waited for an hour in vain: ")
        again = runs.retry(session, failed, "bela")
        assert (again.id, again.state, again.phase, again.error) == (run.id, "running", "evaluating", None)

    evaluate(world, again, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
        assert session.scalars(select(Job.kind).order_by(Job.created_at)).all() == [
            "train", "evaluate", "evaluate", "deploy",
        ]  # fmt: skip
    assert evaluation is not None
    assert evaluation.decision == "promote"


def test_what_was_judged_or_erased_since_is_trained_again(world: World, trained: Trained) -> None:
    run = start(world, trained, corrected(31))
    for change in ({"state": "verified"}, {"tainted_at": func.now()}):
        with world.sessions() as session:
            mine = session.get_one(Run, run.id)
            runs.finish(session, mine, "failed", "failed", "the engine was away")
            for name, value in change.items():
                setattr(session.get_one(Artifact, trained.adapter.digest), name, value)
            session.flush()
            assert runs.retry(session, mine, "bela").id != run.id
            session.rollback()


def test_trying_again_waits_for_another_run(world: World, trained: Trained) -> None:
    run = start(world, trained, corrected(31))
    with world.sessions.begin() as session:
        mine = session.get_one(Run, run.id)
        runs.finish(session, mine, "failed", "failed", "the engine was away")
        runs.start(session, world.project(session), params={}, created_by="ada")
        with pytest.raises(Conflict, match="unfinished"):
            runs.retry(session, mine, "bela")
