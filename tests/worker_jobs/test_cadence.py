"""When heads are trained without being asked: the first traffic, growth, drift, another adapter, a failure."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from services.errors import Conflict, InvalidRequest
from services.store import projects, runs
from services.store.base import Sessions
from services.store.models import Artifact, Deployment, Project, Run, RunEvent
from tests.rollout.drafters import interaction, land
from worker.schedule import SpeculatorCadence

NOW = datetime.now(UTC)
A = "a" * 64
MINUTE = timedelta(minutes=1)


class World:
    """A project with traffic, and the cadence that watches it."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        with sessions.begin() as session:
            self.project_id = projects.create(session, "support").id
        self.cadence = SpeculatorCadence()

    def say(self, tokens: int, at: datetime, *, origin: str = "live", base: str = "base") -> None:
        """One answer of so many tokens."""
        land(self.sessions, [interaction(self.project_id, at, tokens=tokens, origin=origin, base_digest=base)])

    def step(self, at: datetime = NOW, *, drifted: bool = False) -> bool:
        """Whether a training was started."""
        with self.sessions.begin() as session:
            return bool(self.cadence.step(session, at, {self.project_id} if drifted else ()))

    def end_run(self, at: datetime, *, phase: str = "live", state: str = "succeeded") -> None:
        """The last run began then and is over."""
        with self.sessions.begin() as session:
            session.execute(update(Run).where(Run.state == "queued").values(created_at=at, state=state, phase=phase))

    def notes(self) -> list[str]:
        with self.sessions() as session:
            told = select(RunEvent.payload).where(RunEvent.kind == "trigger").order_by(RunEvent.id)
            return [payload["line"] for payload in session.scalars(told)]

    def configure(self, **speculation: object) -> None:
        with self.sessions.begin() as session:
            projects.configure(session, session.get_one(Project, self.project_id), {"speculation": speculation})

    def deploy(self, **columns: object) -> None:
        with self.sessions.begin() as session:
            for digest, kind in ((A, "adapter"), ("1" * 64, "speculator")):
                session.merge(
                    Artifact(digest=digest, kind=kind, project_id=self.project_id, base_digest="base", manifest={})
                )
            session.flush()
            session.execute(update(Deployment).values(**columns))


@pytest.fixture
def world(sessions: Sessions) -> World:
    return World(sessions)


def test_the_first_heads_are_trained_at_fifty_thousand_response_tokens(world: World) -> None:
    world.say(30_000, NOW - timedelta(days=2))
    world.say(19_999, NOW - MINUTE)
    world.say(90_000, NOW - MINUTE, origin="evaluation")
    assert not world.step()

    world.say(1, NOW - MINUTE)
    assert world.step()

    assert world.notes() == ["50000 response tokens are enough for the first heads"]
    with world.sessions() as session:
        run = session.scalars(select(Run)).one()
        assert (run.kind, run.created_by, run.state) == ("speculator", "cadence", "queued")


def test_never_two_trainings_at_once_and_none_within_a_quarter_of_an_hour(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=1))
    assert world.step()
    assert not world.step(NOW + timedelta(hours=5), drifted=True), "the first is unfinished"

    world.end_run(NOW)
    assert not world.step(NOW + 14 * MINUTE, drifted=True)
    assert world.step(NOW + 15 * MINUTE, drifted=True)
    assert world.notes()[-1] == "what heads draft is accepted less often than it was"


def test_the_next_heads_are_trained_when_the_traffic_grew_by_half(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=3))
    world.step()
    world.end_run(NOW - timedelta(hours=2), phase="refused")
    world.say(29_000, NOW - timedelta(hours=1))
    assert not world.step()

    world.say(1_000, NOW - MINUTE)
    assert world.step()
    assert world.notes()[-1] == "30000 new response tokens since the last training"


def test_growth_counts_what_came_even_when_old_rows_are_dropped(world: World) -> None:
    """A dispatcher that starts anew after retention has less in the log than the last training saw."""
    world.say(60_000, NOW - timedelta(hours=3))
    world.step()
    world.end_run(NOW - timedelta(hours=2))
    with world.sessions.begin() as session:
        session.execute(
            update(RunEvent).where(RunEvent.kind == "trigger").values(payload={"tokens": 400_000, "adapter": None})
        )
    world.cadence = SpeculatorCadence()

    world.say(199_000, NOW - MINUTE)
    assert not world.step()
    world.say(1_000, NOW - MINUTE)
    assert world.step()


def test_another_adapter_gets_heads_of_its_own(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=3))
    world.step()
    world.end_run(NOW - timedelta(hours=2))
    assert not world.step()

    world.deploy(active_digest=A)
    assert world.step()
    assert world.notes()[-1] == "another adapter serves now"
    world.end_run(NOW - timedelta(hours=1))
    assert not world.step()


def test_another_base_gets_heads_of_its_own_as_soon_as_it_has_said_enough(world: World) -> None:
    """Half of all that was said before would be far more."""
    world.say(900_000, NOW - timedelta(hours=3))
    world.step()
    world.end_run(NOW - timedelta(hours=2))
    world.say(49_999, NOW - timedelta(hours=1), base="another")
    assert not world.step()

    world.say(1, NOW - MINUTE, base="another")
    assert world.step()
    assert world.notes()[-1] == "another base model serves now"
    world.end_run(NOW - timedelta(minutes=30), phase="refused")
    assert not world.step(), "once is enough"


def test_heads_that_came_back_with_their_adapter_need_no_training(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=3))
    world.step()
    world.end_run(NOW - timedelta(hours=2))
    world.deploy(active_digest=A, speculator_digest="1" * 64)
    assert not world.step()


def test_a_run_that_a_person_started_counts_by_its_artefact(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=3))
    world.deploy(frozen=False)
    with world.sessions.begin() as session:
        session.get_one(Artifact, "1" * 64).manifest = {"adapter": A}
        session.add(
            Run(project_id=world.project_id, kind="speculator", params={}, created_by="ada", state="succeeded",
                phase="live", created_at=NOW - timedelta(hours=2), artifact_digest="1" * 64)
        )  # fmt: skip
    assert world.step(), "its heads are of an adapter that does not serve"


def test_a_failed_training_is_tried_again_ever_later_and_three_times_at_most(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=3))
    at = NOW
    for pause in (30, 60, 120):
        assert world.step(at)
        world.end_run(at, state="failed", phase="failed")
        assert not world.step(at + (pause - 1) * MINUTE)
        at += pause * MINUTE
    assert world.step(at)
    world.end_run(at, state="failed", phase="failed")
    assert not world.step(at + timedelta(days=9))
    assert "(3 of 3)" in world.notes()[-1]


def test_drift_waits_for_a_failed_training_as_everything_else_does(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=3))
    at = NOW
    for pause in (30, 60, 120, 240):
        assert world.step(at, drifted=True)
        world.end_run(at, state="failed", phase="failed")
        assert not world.step(at + (pause - 1) * MINUTE, drifted=True)
        at += pause * MINUTE
    assert not world.step(at)
    assert world.step(at, drifted=True)


@pytest.mark.parametrize("config", [{"enabled": False}, {"automatic": False}])
def test_a_project_that_wants_none_gets_none(world: World, config: dict[str, Any]) -> None:
    world.configure(**config)
    world.say(60_000, NOW - timedelta(hours=1))
    assert not world.step(drifted=True)


def test_settings_are_the_projects_own(world: World) -> None:
    world.configure(first_tokens=100, growth=3, min_minutes=1)
    world.say(100, NOW - timedelta(hours=1))
    assert world.step()
    world.end_run(NOW)
    world.say(199, NOW + MINUTE)
    assert not world.step(NOW + 2 * MINUTE)
    world.say(1, NOW + MINUTE)
    assert world.step(NOW + 2 * MINUTE)


def test_while_heads_are_on_trial_no_others_are_trained(world: World) -> None:
    world.say(60_000, NOW - timedelta(hours=1))
    world.deploy(speculator_canary_digest="1" * 64, speculator_share=0.5)
    assert not world.step(drifted=True)


def test_every_token_is_counted_once_however_long_the_cadence_runs(world: World) -> None:
    for hour in range(10):
        at = NOW + timedelta(hours=hour)
        assert not world.step(at)
        world.say(5_000, at - MINUTE)
    assert world.step(NOW + timedelta(hours=10))
    assert world.notes() == ["50000 response tokens are enough for the first heads"]


@pytest.mark.parametrize("error", [Conflict("somebody was faster"), InvalidRequest("bad parameters")])
def test_who_cannot_train_says_so_and_harms_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    world.say(60_000, NOW - timedelta(hours=1))

    def refuse(session: Session, *_: object, **__: object) -> Run:
        session.add(RunEvent(run_id=world.project_id, kind="log", payload={}))
        raise error

    monkeypatch.setattr(runs, "start", refuse)
    with capture_logs() as lines:
        assert not world.step()
    assert [line["error"] for line in lines] == [str(error)]
