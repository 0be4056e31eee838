"""One project's heads from the first traffic to the last roll-back, on a real engine, with requests as they are logged.

Only the trainer is left out: its artefact and its hand-over are made by hand.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from engine.sync_client import SyncEngineClient
from services.settings import Settings
from services.store import jobs, runs
from services.store.models import Run
from services.store.speculation import Heads
from tests.engine.speculators import random_speculator
from tests.rollout.conftest import EngineUnderTest, World
from tests.rollout.drafters import EVEN, Speeds, Traffic, configure, deployed, drafting, heads, history, serve, set_back
from worker.rollout.reconcile import Reconciler
from worker.rollout.watch import Watch
from worker.schedule import SpeculatorCadence
from worker.tasks import HANDLERS

HOUR = timedelta(hours=1)
BETTER: Speeds = {**EVEN, "canary": (2.8, 130.0), "live": (2.8, 130.0)}
WORSE: Speeds = {**EVEN, "live": (1.4, 80.0)}


class Life:
    """Everything of the platform that has to do with heads, step by step."""

    def __init__(self, world: World, engine: EngineUnderTest, settings: Settings, client: SyncEngineClient) -> None:
        self.world, self.engine, self.settings, self.client = world, engine, settings, client
        self.cadence, self.watch = SpeculatorCadence(), Watch()
        self.clock = 0.0
        self.reconciler = Reconciler(world.sessions, client, engine.artifacts, clock=lambda: self.clock)
        self.traffic = Traffic(world, datetime.now(UTC) - 20 * HOUR)

    def dispatch(self) -> list[str]:
        """What the dispatcher does in its tick; the alarms."""
        with capture_logs() as lines:
            self.watch.step(self.world.sessions, self.traffic.at)
            with self.world.sessions.begin() as session:
                self.cadence.step(session, self.traffic.at, self.watch.drifted)
            self.reconciler.step()
            self.clock += 3.1
            self.reconciler.step()
        return [line["event"] for line in lines if line.get("alarm")]

    def runs(self) -> list[Run]:
        with self.world.sessions() as session:
            return runs.list_(session, self.world.project_id)

    def train_and_deploy(self, seed: int) -> str:
        """What the trainer leaves, and the job that takes it from there."""
        adapter = deployed(self.world).active_digest
        digest = random_speculator(self.engine.artifacts, self.engine.model, adapter=adapter, seed=seed)
        heads(self.world, digest, adapter=adapter, base=self.engine.base)
        with self.world.sessions.begin() as session:
            run = session.get_one(Run, self.runs()[0].id)
            assert run.state == "queued"
            run.created_at = self.traffic.at
            run.artifact_digest = digest
            payload = {"project_id": str(run.project_id), "digest": digest, "run_id": str(run.id)}
            job_id = runs.hand_over(session, run, "deploy.speculator", payload).id
        self.work(job_id)
        # The test's clock is the traffic's.
        set_back(self.world, "speculator_canary", self.traffic.at)
        self.traffic.at += timedelta(seconds=10)
        return digest

    def work(self, job_id: UUID) -> None:
        lease = jobs.claim(self.world.sessions, job_id, "test")
        assert lease is not None
        with lease:
            HANDLERS[lease.kind](lease, self.settings)

    def loaded(self) -> set[str]:
        return {slot.digest for slot in self.client.status().speculators}


@pytest.fixture
def life(world: World, engine: EngineUnderTest, settings: Settings) -> Iterator[Life]:
    with SyncEngineClient(engine.socket) as client:
        yield Life(world, engine, settings, client)


def test_from_the_first_traffic_to_the_last_roll_back(life: Life) -> None:
    world, traffic = life.world, life.traffic
    configure(world, first_tokens=20_000, min_minutes=1, growth=1.2)
    traffic.land(200, EVEN)
    life.dispatch()
    assert life.runs() == [], "too little traffic"

    traffic.land(300, EVEN)
    life.dispatch()
    assert [run.created_by for run in life.runs()] == ["cadence"]
    first = life.train_and_deploy(71)
    life.dispatch()
    assert (drafting(world), life.loaded()) == (Heads(None, first, 0.25), {first})

    traffic.land(500, BETTER)
    life.dispatch()
    assert (drafting(world), world.state(first)) == (Heads(first), "live")
    set_back(world, "speculator_live", traffic.at)

    traffic.at += HOUR
    traffic.land(100, BETTER)
    life.dispatch()
    second = life.train_and_deploy(72)
    assert drafting(world) == Heads(first, second, 0.25)
    configure(world, first_tokens=20_000, min_minutes=1, growth=100)
    traffic.land(500, {**BETTER, "canary": (3.4, 160.0)})
    life.dispatch()
    set_back(world, "speculator_live", traffic.at)
    assert (drafting(world), world.state(first)) == (Heads(second), "retired")
    life.dispatch()
    assert life.loaded() == {second}, "nobody names the old ones any more"

    traffic.at += timedelta(seconds=10)
    traffic.land(1500, WORSE)
    assert "live heads rolled back" in life.dispatch()
    assert (drafting(world), world.state(second)) == (Heads(first), "rolled_back")
    assert life.loaded() == {first}

    adapter = life.engine.adapter(73)
    serve(world, adapter)
    traffic.at += HOUR
    life.dispatch()
    assert (drafting(world), world.state(first), life.loaded()) == (Heads(), "retired", set())
    with world.sessions() as session:
        newest = runs.events(session, life.runs()[0].id)
    assert newest[-1].payload["line"] == "another adapter serves now"
    own = life.train_and_deploy(74)
    life.dispatch()
    assert {slot.digest: slot.adapter for slot in life.client.status().speculators} == {own: adapter}

    kinds = [event.kind.removeprefix("speculator_") for event in history(world)]
    assert kinds == ["canary", "live", "canary", "live", "rolled_back", "flip", "retired", "canary"]
