"""The engine follows the deployment rows: after flips, after its own death, with broken files, under requests."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from msgspec import structs
from sqlalchemy import func, update
from structlog.testing import capture_logs

from engine.client import Completion, EngineGone, EngineRefused
from engine.messages import Generate, Sampling, Status
from engine.sync_client import SyncEngineClient
from services.store import deployments, engine_reports, jobs, projects, rollouts
from services.store.models import Deployment, DeploymentEvent, EngineReport
from services.store.rollout_config import RolloutConfig
from tests.rollout.conftest import ROOT, EngineUnderTest, World
from tests.rollout.trials import BY_ADA
from worker.rollout.reconcile import Reconciler


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Setting:
    """A reconciler between the test's database and the module's engine."""

    def __init__(self, world: World, engine: EngineUnderTest, client: SyncEngineClient) -> None:
        self.world = world
        self.engine = engine
        self.clock = Clock()
        self.reconciler = Reconciler(world.sessions, client, engine.artifacts, clock=self.clock)

    def serve(self, digest: str | None) -> None:
        with self.world.sessions.begin() as session:
            generation = deployments.get(session, self.world.project_id).generation
            deployments.flip(
                session, self.world.project_id, expected_generation=generation, digest=digest, actor="test", reason="t"
            )

    def trial(self, digest: str) -> int:
        """Put a staged artefact on trial; returns the generation."""
        with self.world.sessions.begin() as session:
            return rollouts.begin(session, self.world.project_id, digest, RolloutConfig(), BY_ADA, None).generation

    def report(self) -> tuple[int, list[str]]:
        """What the engine last said of the project."""
        with self.world.sessions() as session:
            [row] = engine_reports.of_project(session, self.world.project_id)
        return row.generation, sorted(row.digests)

    def probe(self) -> datetime | None:
        with self.world.sessions() as session:
            return deployments.get(session, self.world.project_id).probe_until

    def settle(self) -> None:
        """Two looks with the grace between them."""
        self.reconciler.step()
        self.clock.now += 3.1
        self.reconciler.step()

    def newest_event(self) -> DeploymentEvent:
        with self.world.sessions() as session:
            return deployments.events(session, self.world.project_id)[0]


@pytest.fixture
def setting(world: World, engine: EngineUnderTest):  # type: ignore[no-untyped-def]  # noqa: ANN201
    with SyncEngineClient(engine.socket) as client:
        made = Setting(world, engine, client)
        made.settle()
        assert engine.digests() == set()
        yield made


def staged(setting: Setting, seed: int) -> str:
    return setting.world.artifact(setting.engine.adapter(seed), "staged", base=setting.engine.base)


def test_a_canary_is_loaded_beside_what_is_live_and_freed_when_it_ends(setting: Setting) -> None:
    live, candidate = staged(setting, 41), staged(setting, 42)
    setting.serve(live)
    trying = setting.trial(candidate)
    setting.reconciler.step()
    assert setting.engine.digests() == {live, candidate}
    assert setting.report() == (trying, sorted([live, candidate]))

    with setting.world.sessions.begin() as session:
        rollouts.back(session, setting.world.project_id, "newest", BY_ADA)
    setting.settle()

    assert setting.engine.digests() == {live}
    assert setting.report() == (trying + 1, [live])


def test_a_canary_that_cannot_be_loaded_is_quarantined_and_what_is_live_stays(setting: Setting) -> None:
    live, candidate = staged(setting, 43), staged(setting, 44)
    setting.serve(live)
    (setting.engine.artifacts / candidate / "adapter_model.safetensors").write_bytes(b"broken")
    setting.trial(candidate)
    setting.reconciler.step()
    with setting.world.sessions() as session:
        row = deployments.get(session, setting.world.project_id)
    assert (row.active_digest, row.canary_digest, row.automatic_rollbacks) == (live, None, 1)
    assert setting.world.state(candidate) == "quarantined"
    assert setting.newest_event().kind == "canary_quarantined"


def test_an_engine_says_which_generation_it_has_and_that_it_is_still_there(setting: Setting) -> None:
    live = staged(setting, 45)
    setting.serve(live)
    setting.reconciler.step()
    generation, digests = setting.report()
    assert (generation, digests) == (2, [live])
    with setting.world.sessions.begin() as session:
        session.execute(update(EngineReport).values(seen_at=func.now() - timedelta(minutes=5)))
        lagging = engine_reports.lagging(session, setting.world.project_id, 3, live, datetime.now(UTC))
    assert lagging == [], "one that nobody has heard of for minutes is not waited for"
    setting.clock.now += 5.1
    setting.reconciler.step()
    with setting.world.sessions() as session:
        for generation, digest, lagging in ((3, live, ["engine"]), (2, live, []), (2, "f" * 64, ["engine"])):
            now = datetime.now(UTC)
            assert engine_reports.lagging(session, setting.world.project_id, generation, digest, now) == lagging


def test_what_goes_live_is_confirmed_by_an_engine_that_serves_it(setting: Setting) -> None:
    setting.serve(staged(setting, 46))
    assert setting.probe() is not None
    setting.reconciler.step()
    assert setting.probe() is None


class CannotRead(SyncEngineClient):
    """An engine that is there and cannot read any artefact just now."""

    def load_adapter(self, digest: str, path: str) -> None:
        raise EngineRefused("the disk is away", transient=True)


def test_what_no_engine_can_load_by_its_deadline_is_rolled_back(setting: Setting) -> None:
    live, unreadable = staged(setting, 47), staged(setting, 48)
    setting.serve(live)
    setting.reconciler.step()
    setting.serve(unreadable)
    with CannotRead(setting.engine.socket) as client:
        reconciler = Reconciler(setting.world.sessions, client, setting.engine.artifacts)
        reconciler.step()
        assert setting.world.state(unreadable) == "live", "its deadline has not passed"
        with setting.world.sessions.begin() as session:
            session.execute(update(Deployment).values(probe_until=func.now() - timedelta(seconds=1)))
        reconciler.step()
    with setting.world.sessions() as session:
        row = deployments.get(session, setting.world.project_id)
    assert (row.active_digest, row.automatic_rollbacks, row.probe_until) == (live, 1, None)
    assert setting.world.state(unreadable) == "rolled_back"
    assert "unconfirmed" in setting.newest_event().reason


def test_what_is_deployed_is_loaded_and_the_old_one_freed_after_the_grace(setting: Setting) -> None:
    old, new = staged(setting, 11), staged(setting, 12)
    setting.serve(old)
    setting.reconciler.step()
    assert setting.engine.digests() == {old}

    setting.serve(new)
    setting.reconciler.step()
    setting.clock.now += 2.0
    setting.reconciler.step()
    assert setting.engine.digests() == {old, new}, "gateways may still name the old digest"
    setting.clock.now += 1.5
    setting.reconciler.step()

    assert setting.engine.digests() == {new}


def test_an_adapter_is_not_freed_while_a_request_reads_it(setting: Setting) -> None:
    digest = staged(setting, 13)
    setting.serve(digest)
    setting.reconciler.step()
    outcome: list[Completion] = []
    asking = threading.Thread(target=lambda: outcome.append(ask_long(setting.engine, digest)))
    asking.start()
    while not referenced(setting.engine, digest):
        time.sleep(0.005)
    setting.serve(None)

    setting.settle()
    still_running = asking.is_alive()
    held = digest in setting.engine.digests()
    asking.join(30)

    assert still_running, "the request ended before the reconciliation was tried"
    assert held
    assert outcome[0].finished.reason == "length"
    assert outcome[0].finished.adapter == digest
    setting.reconciler.step()
    assert setting.engine.digests() == set()


class LateReader(SyncEngineClient):
    """Sees no references: every request seems to arrive just after the look."""

    def status(self) -> Status:
        status = super().status()
        return structs.replace(status, slots=[structs.replace(slot, references=0) for slot in status.slots])


def test_a_request_that_arrives_during_an_unload_does_not_hold_up_the_loading(setting: Setting) -> None:
    old, new = staged(setting, 20), staged(setting, 21)
    setting.engine.load(old)
    outcome: list[Completion] = []
    asking = threading.Thread(target=lambda: outcome.append(ask_long(setting.engine, old)))
    asking.start()
    while not referenced(setting.engine, old):
        time.sleep(0.005)
    setting.serve(new)

    with LateReader(setting.engine.socket) as client:
        Reconciler(
            setting.world.sessions, client, setting.engine.artifacts, grace_seconds=0.0, unload_seconds=0.01
        ).step()
    still_running = asking.is_alive()
    loaded = setting.engine.digests()
    asking.join(30)

    assert still_running, "the reconciliation waited for the request"
    assert new in loaded
    assert outcome[0].finished.reason == "length"
    assert setting.engine.digests() == {new}, "freed without being asked again"


def ask_long(engine: EngineUnderTest, digest: str) -> Completion:
    with SyncEngineClient(engine.socket) as client:
        sampling = Sampling(temperature=1.0, seed=1, max_tokens=2000)
        return client.generate(Generate(id="long", prompt=[5, 6], sampling=sampling, adapter=digest))


def referenced(engine: EngineUnderTest, digest: str) -> bool:
    with SyncEngineClient(engine.socket) as client:
        return any(slot.digest == digest and slot.references for slot in client.status().slots)


def test_a_candidate_of_an_unfinished_run_or_job_is_left_alone(setting: Setting) -> None:
    candidate, ordered = staged(setting, 14), staged(setting, 15)
    setting.world.run(candidate, outputs=[])
    with setting.world.sessions.begin() as session:
        job_id = jobs.enqueue(session, "deploy", {"digest": ordered}).id
    setting.engine.load(candidate)
    setting.engine.load(ordered)

    setting.settle()
    assert setting.engine.digests() == {candidate, ordered}
    with setting.world.sessions.begin() as session:
        jobs.request_cancel(session, job_id)
    setting.settle()

    assert setting.engine.digests() == {candidate}


def test_after_the_engine_died_the_live_digest_is_back_without_a_flip(setting: Setting) -> None:
    digest = staged(setting, 16)
    setting.serve(digest)
    setting.reconciler.step()

    setting.engine.stop(signal.SIGKILL)
    setting.engine.start()
    with pytest.raises(EngineGone):
        setting.reconciler.step()
    setting.reconciler.step()

    assert setting.engine.digests() == {digest}
    assert setting.newest_event().kind == "flip"


def test_a_live_artefact_that_cannot_be_loaded_gives_way_to_the_last_good_and_then_to_the_base(
    setting: Setting,
) -> None:
    good, bad = staged(setting, 17), staged(setting, 18)
    setting.serve(good)
    setting.serve(bad)
    damage(setting.engine, bad)

    setting.reconciler.step()
    assert (setting.newest_event().kind, setting.newest_event().to_digest) == ("roll_back", good)
    assert setting.newest_event().actor == "dispatcher"
    assert "refused" in setting.newest_event().reason
    assert setting.world.state(bad) == "quarantined"
    setting.reconciler.step()
    assert setting.engine.digests() == {good}

    setting.serve(None)
    setting.settle()
    setting.serve(good)
    damage(setting.engine, good)
    setting.reconciler.step()
    with setting.world.sessions() as session:
        frozen, back = deployments.events(session, setting.world.project_id)[:2]
    assert (back.kind, back.to_digest) == ("roll_back", None)
    assert frozen.kind == "frozen", "it was the second one that nobody asked for"
    assert setting.world.state(good) == "quarantined"


@pytest.mark.parametrize(
    ("failpoint", "seed"), [("reconcile.loaded", 51), ("probe.confirmed", 53), ("reconcile.retreating", 55)]
)
def test_killed_at_any_point_the_next_step_ends_with_one_live_digest(
    setting: Setting, failpoint: str, seed: int
) -> None:
    good, new = staged(setting, seed), staged(setting, seed + 1)
    setting.serve(good)
    setting.serve(new)
    broken = failpoint == "reconcile.retreating"
    if broken:
        damage(setting.engine, new)
    database = setting.world.sessions.kw["bind"].url.render_as_string(hide_password=False)
    died = subprocess.run(
        [sys.executable, "-m", "tests.rollout.reconciling", database, setting.engine.socket, setting.engine.artifacts],
        cwd=ROOT, env={**os.environ, "WHET_FAILPOINT": failpoint}, capture_output=True, timeout=90,
    )  # fmt: skip
    assert died.returncode == 137, died.stderr.decode()
    setting.settle()
    setting.settle()
    with setting.world.sessions() as session:
        row = deployments.get(session, setting.world.project_id)
        back = [event for event in deployments.events(session, setting.world.project_id) if event.kind == "roll_back"]
    live = good if broken else new
    assert (row.active_digest, row.probe_until, len(back)) == (live, None, int(broken))
    assert setting.engine.digests() == {live}
    assert setting.world.state(live) == "live"


def damage(engine: EngineUnderTest, digest: str) -> None:
    weights = engine.artifacts / digest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def test_an_artefact_of_another_base_model_is_neither_loaded_nor_condemned(setting: Setting) -> None:
    good = staged(setting, 19)
    foreign = setting.world.artifact("f" * 64, "staged", base="another model")
    setting.serve(good)
    setting.serve(foreign)

    with capture_logs() as lines:
        setting.settle()

    assert setting.engine.digests() == set()
    assert (setting.newest_event().kind, setting.newest_event().to_digest) == ("flip", foreign)
    assert setting.world.state(foreign) == "live"
    alarms = [line for line in lines if line.get("alarm")]
    assert [alarm["digests"] for alarm in alarms] == [[foreign]], "one alarm, not one a second"


def test_more_deployments_than_slots_roll_nobody_back(setting: Setting) -> None:
    digests = [serve_elsewhere(setting, number) for number in range(7)]

    setting.reconciler.step()
    loaded = setting.engine.digests()
    setting.reconciler.step()

    assert loaded < set(digests)
    assert len(loaded) == 5, "all slots but the spare one"
    assert setting.engine.digests() == loaded, "loading one must not push out another"
    assert {setting.world.state(digest) for digest in digests} == {"live"}


def serve_elsewhere(setting: Setting, number: int) -> str:
    with setting.world.sessions.begin() as session:
        project_id: UUID = projects.create(session, f"project-{number}").id
    digest = setting.world.artifact(
        setting.engine.adapter(30 + number), "staged", project_id=project_id, base=setting.engine.base
    )
    with setting.world.sessions.begin() as session:
        deployments.flip(session, project_id, expected_generation=1, digest=digest, actor="test", reason="t")
    return digest
