"""Several engines on one deployment row: each obeys it by itself, and none condemns what another serves."""

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, update
from structlog.testing import capture_logs

from services.store import deployments, engine_reports, rollouts
from services.store.models import EngineReport
from services.store.rollout_config import RolloutConfig
from tests.rollout.conftest import World
from tests.rollout.slots import TOO_HIGH, Slots
from tests.rollout.trials import BY_ADA
from worker.rollout.reconcile import AGAIN_SECONDS, Reconciler

A, B = "a" * 64, "b" * 64


class Engine:
    """A reconciler with its engine, and a clock that moves when the test says so."""

    def __init__(self, world: World, name: str) -> None:
        self.name, self.slots, self.now = name, Slots(), 0.0
        self._world = world
        self._reconciler = Reconciler(
            world.sessions,
            self.slots,
            Path("artifacts"),
            clock=lambda: self.now,
            engine=name,  # type: ignore[arg-type]
        )

    def step(self, after: float = 6.0) -> None:
        """A look, so long after the last one; by default long enough for the engine to say that it is there."""
        self.now += after
        self._reconciler.step()

    def report(self) -> tuple[int, list[str]]:
        """What it last said of the project."""
        with self._world.sessions() as session:
            reports = {one.engine: one for one in engine_reports.of_project(session, self._world.project_id)}
        return reports[self.name].generation, reports[self.name].digests


@pytest.fixture
def engines(world: World) -> tuple[Engine, Engine]:
    """Both have said that they are there, of a project that serves the base."""
    first, second = Engine(world, "engine"), Engine(world, "extra")
    first.step()
    second.step()
    return first, second


def serve(world: World, digest: str) -> int:
    """Flip to weights that were staged; returns the generation."""
    world.artifact(digest, "staged")
    with world.sessions.begin() as session:
        generation = deployments.get(session, world.project_id).generation
        return deployments.flip(
            session, world.project_id, expected_generation=generation, digest=digest, actor="test", reason="t"
        ).generation


def active(world: World) -> str | None:
    with world.sessions() as session:
        return deployments.get(session, world.project_id).active_digest


def test_both_engines_load_what_the_row_says_and_each_reports_its_generation(
    world: World, engines: tuple[Engine, Engine]
) -> None:
    first, second = engines
    generation = serve(world, A)

    first.step()
    assert (first.report(), second.report()) == ((generation, [A]), (generation - 1, []))
    second.step()

    assert (first.report(), second.report()) == ((generation, [A]), (generation, [A]))


@pytest.mark.parametrize("refuser_looks_first", [True, False])
def test_what_one_engine_refuses_and_another_serves_is_left_out_there_and_goes_on_serving(
    world: World, engines: tuple[Engine, Engine], *, refuser_looks_first: bool
) -> None:
    first, extra = engines
    extra.slots.refuses = {A}
    generation = serve(world, A)

    with capture_logs() as lines:
        for engine in (extra, first) if refuser_looks_first else (first, extra):
            engine.step()
        for _ in range(4):
            extra.step(AGAIN_SECONDS)

    assert (active(world), world.state(A)) == (A, "live")
    assert (first.report(), extra.report()) == ((generation, [A]), (generation - 1, []))
    [alarm] = [line for line in lines if line.get("alarm")]
    assert (alarm["engine"], alarm["served_by"], alarm["error"]) == ("extra", ["engine"], TOO_HIGH)


def test_a_refused_artefact_is_not_read_from_the_disk_again_every_second(
    world: World, engines: tuple[Engine, Engine]
) -> None:
    first, extra = engines
    extra.slots.refuses = {A}
    serve(world, A)
    first.step()

    for _ in range(14):
        extra.step(1.0)

    assert extra.slots.asked == 1


def test_an_engine_that_was_left_out_loads_it_once_it_can(world: World, engines: tuple[Engine, Engine]) -> None:
    first, extra = engines
    extra.slots.refuses = {A}
    generation = serve(world, A)
    first.step()
    extra.step()

    extra.slots.refuses = set()
    extra.step(AGAIN_SECONDS)

    assert extra.report() == (generation, [A])


def test_what_no_engine_can_load_is_condemned_when_both_have_had_their_turn(
    world: World, engines: tuple[Engine, Engine]
) -> None:
    first, extra = engines
    first.slots.refuses = extra.slots.refuses = {A}
    serve(world, A)

    first.step()
    extra.step()
    assert world.state(A) == "live", "the other engine may be loading it"
    first.step(AGAIN_SECONDS)

    assert (active(world), world.state(A)) == (None, "quarantined")
    with world.sessions() as session:
        newest = deployments.events(session, world.project_id)[0]
    assert (newest.kind, newest.evidence["engine"]) == ("roll_back", "engine")
    assert TOO_HIGH in newest.reason


def test_weights_are_not_condemned_because_the_engine_that_serves_them_is_restarting(
    world: World, engines: tuple[Engine, Engine]
) -> None:
    first, extra = engines
    extra.slots.refuses = {A}
    serve(world, A)
    first.step()
    extra.step()

    unheard(world, "engine", timedelta(minutes=2))
    extra.step(AGAIN_SECONDS)
    assert world.state(A) == "live"
    unheard(world, "engine", timedelta(minutes=11))
    extra.step(AGAIN_SECONDS)

    assert world.state(A) == "quarantined", "nobody serves it any more"


def unheard(world: World, engine: str, span: timedelta) -> None:
    with world.sessions.begin() as session:
        session.execute(update(EngineReport).where(EngineReport.engine == engine).values(seen_at=func.now() - span))


def test_a_candidate_that_one_engine_refuses_stays_on_trial_in_the_other(
    world: World, engines: tuple[Engine, Engine]
) -> None:
    first, extra = engines
    extra.slots.refuses = {B}
    serve(world, A)
    world.artifact(B, "staged")
    with world.sessions.begin() as session:
        rollouts.begin(session, world.project_id, B, RolloutConfig(), BY_ADA, None)

    first.step()
    extra.step()
    extra.step(AGAIN_SECONDS)

    assert (first.report()[1], extra.report()[1]) == ([A, B], [A])
    assert world.state(B) in ("shadow", "canary")
