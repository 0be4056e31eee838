"""When adapters are trained without being asked: by count, by schedule, by drift; never two at once, or in a loop."""

import json
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from services.store import datasets, deployments, imports, projects, runs
from services.store.base import Sessions
from services.store.drift import Drift
from services.store.drift_rules import LEAST_LABELS, Drop
from services.store.models import Artifact, DeploymentEvent, Project, ReviewItem, Rollout, Run, RunEvent
from services.store.train_when import TrainWhen, last_due
from tests.curation.world import World, make_world
from worker.cadence import MOST_FAILURES, TrainCadence

HOUR = timedelta(hours=1)
NOW = datetime.now(UTC)


class Watched:
    """A project, its reviews, and the cadence that watches it."""

    def __init__(self, sessions: Sessions) -> None:
        self.world: World = make_world(sessions)
        self.sessions = sessions
        self.cadence = TrainCadence()

    def when(self, **config: object) -> None:
        with self.sessions.begin() as session:
            projects.configure(session, self.world.project(session), {"train_when": {"min_minutes": 60} | config})

    def review(self, count: int, *, at: datetime = NOW, verdict: str = "accept", window: str = "w") -> None:
        """So many answers judged at a moment; they come out of a sampling window."""
        for number in range(count):
            logged = self.world.log(f"{window} {number} {at.timestamp()}")
            item = self.world.item(logged, window=window, stratum_size=count)
            self.world.judge(item, verdict)
        with self.sessions.begin() as session:
            session.execute(update(ReviewItem).where(ReviewItem.window == window).values(done_at=at))

    def step(self, at: datetime = NOW) -> bool:
        with self.sessions.begin() as session:
            return bool(self.cadence.step(session, at))

    def end(self, began: datetime, *, state: str = "succeeded", by: str | None = None) -> None:
        """The unfinished run began then and is over."""
        with self.sessions.begin() as session:
            values = {"created_at": began, "state": state} | ({"created_by": by} if by else {})
            session.execute(update(Run).where(Run.state == "queued").values(values))

    def live(self, since: datetime) -> None:
        """Other weights went live then."""
        with self.sessions.begin() as session:
            event = {"kind": "flip", "generation": 2, "actor": "ada", "reason": "r", "at": since}
            session.add(DeploymentEvent(project_id=self.world.project_id, to_digest=self.artifact(session), **event))

    def artifact(self, session: Session) -> str:
        values = {"kind": "adapter", "base_digest": "b", "manifest": {}, "state": "canary"}
        made = Artifact(digest=uuid4().hex, project_id=self.world.project_id, **values)
        session.add(made)
        session.flush()
        return made.digest

    def import_(self, dataset: str, count: int) -> None:
        with self.sessions.begin() as session:
            rows = "".join(json.dumps({"prompt": f"{dataset} {n}", "completion": "c"}) + "\n" for n in range(count))
            target = datasets.get_or_create(session, self.world.project_id, dataset)
            imports.finish(session, imports.begin(session, target, "rows.jsonl", rows.encode(), "ada"), None, "ada")

    def reasons(self) -> list[str]:
        with self.sessions() as session:
            told = select(RunEvent.payload).where(RunEvent.kind == "trigger").order_by(RunEvent.id)
            return [payload["line"] for payload in session.scalars(told)]


@pytest.fixture
def watched(sessions: Sessions) -> Watched:
    return Watched(sessions)


def test_enough_reviewed_answers_start_a_run_and_it_says_why(watched: Watched) -> None:
    watched.when(examples=3, kind="dpo")
    watched.review(2)
    assert not watched.step()

    watched.review(1, window="v")
    assert watched.step()

    assert watched.reasons() == ["3 answers were reviewed or imported since the last run"]
    with watched.sessions() as session:
        [run] = runs.list_(session, watched.world.project_id)
    assert (run.kind, run.created_by, run.state) == ("dpo", "cadence", "queued")


def test_without_being_asked_for_nothing_starts(watched: Watched) -> None:
    watched.review(5)
    assert not watched.step()
    watched.when()
    assert not watched.step()


def test_never_two_at_once_and_a_pause_between_them(watched: Watched) -> None:
    watched.when(examples=1)
    watched.review(1, at=NOW - 3 * HOUR)
    assert watched.step()
    watched.review(1, window="v")
    assert not watched.step(NOW + 5 * HOUR)

    watched.end(NOW - HOUR / 2)
    assert not watched.step()
    assert watched.step(NOW + HOUR)


def test_what_was_learned_already_does_not_count_again(watched: Watched) -> None:
    watched.when(examples=2)
    watched.review(2, at=NOW - 5 * HOUR)
    assert watched.step()
    watched.end(NOW - 4 * HOUR)

    assert not watched.step()


def test_the_schedule_starts_a_run_only_when_there_is_something_new(watched: Watched) -> None:
    watched.when(every_hours=6)
    assert not watched.step()
    watched.review(1, at=NOW - 8 * HOUR)
    assert watched.step()
    watched.end(NOW - 7 * HOUR)
    assert not watched.step()

    watched.review(1, window="v", at=NOW - HOUR)
    assert watched.step()
    assert watched.reasons()[-1] == "every 6 hours"


def test_once_a_day_at_its_time(watched: Watched) -> None:
    watched.when(daily_at="03:00")
    two, three = (datetime(2027, 1, 5, hour, 30, tzinfo=UTC) for hour in (2, 3))
    watched.review(1, at=datetime(2027, 1, 4, 12, tzinfo=UTC))
    assert not watched.step(datetime(2027, 1, 4, 14, tzinfo=UTC)), "at its time, not when something comes"
    assert watched.step(three)
    watched.end(three)
    watched.review(1, window="v", at=three + HOUR)
    assert not watched.step(three + 3 * HOUR)
    assert not watched.step(two + timedelta(days=1))
    assert watched.step(three + timedelta(days=1))
    assert watched.reasons()[-1] == "every day at 03:00 UTC"


def test_last_due_is_the_time_that_passed_last() -> None:
    when = TrainWhen(daily_at="03:00")
    assert last_due(when, datetime(2027, 1, 5, 2, 59, tzinfo=UTC)) == datetime(2027, 1, 4, 3, tzinfo=UTC)
    assert last_due(when, datetime(2027, 1, 5, 3, 0, tzinfo=UTC)) == datetime(2027, 1, 5, 3, tzinfo=UTC)


def test_drift_starts_one_run_and_another_only_when_much_more_was_judged(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Drift | None] = [None]
    monkeypatch.setattr("worker.cadence.drift.drifted", lambda *_, **__: found[0])
    moments = (NOW + timedelta(hours=number) for number in range(9))
    watched.when(drift_points=10)
    watched.live(NOW - 90 * HOUR)
    assert not watched.step(next(moments))
    watched.review(1)
    assert not watched.step(next(moments)), "nothing has drifted"
    found[0] = Drift("quality", "a little", drop=Drop(0.90, 0.81, -0.2, -0.01))
    assert not watched.step(next(moments)), "nine points are not ten"

    found[0] = Drift("input", "other things are asked")
    now = next(moments)
    assert watched.step(now)
    assert watched.reasons() == ["other things are asked"]
    watched.end(now, by="cadence")
    watched.review(LEAST_LABELS - 1, at=now + HOUR / 2, window="v")
    assert not watched.step(next(moments))
    watched.review(1, at=now + HOUR / 2, window="u")
    now = next(moments)
    assert watched.step(now)

    watched.end(now)
    watched.live(now)
    watched.review(1, at=now + HOUR / 2, window="x")
    found[0] = Drift("quality", "much", drop=Drop(0.90, 0.79, -0.2, -0.01))
    assert watched.step(next(moments)), "other weights serve: they may drift too"
    assert watched.reasons()[-1] == "much"


def test_nothing_starts_while_a_candidate_is_on_trial_or_promotion_is_frozen(watched: Watched) -> None:
    watched.when(examples=1)
    watched.review(1)
    with watched.sessions.begin() as session:
        deployment = deployments.get(session, watched.world.project_id)
        deployment.frozen = True
    assert not watched.step()

    with watched.sessions.begin() as session:
        deployments.get(session, watched.world.project_id).frozen = False
        digest = watched.artifact(session)
        trial = {"digest": digest, "stage": "canary", "generation": 1, "salt": "s", "config": {}}
        session.add(Rollout(project_id=watched.world.project_id, **trial))
    assert not watched.step()

    with watched.sessions.begin() as session:
        session.execute(update(Rollout).values(stage="promoted"))
    assert watched.step()


def test_imported_examples_count_where_they_are_trained_on(watched: Watched) -> None:
    watched.when(examples=3)
    watched.review(1)
    watched.import_("other", 5)
    assert not watched.step()
    watched.import_("golden", 2)
    assert watched.step()
    watched.end(datetime.now(UTC))
    watched.review(1, at=NOW + HOUR, window="v")
    assert not watched.step(NOW + 2 * HOUR), "what was there before the run is not new"


def test_a_run_that_fails_again_and_again_is_left_to_a_person(watched: Watched) -> None:
    watched.when(examples=1)
    for number in range(MOST_FAILURES):
        watched.review(1, window=str(number), at=NOW - (20 - 5 * number) * HOUR)
        assert watched.step()
        watched.end(NOW - (19 - 5 * number) * HOUR, state="failed")
    watched.review(1, window="last")
    assert not watched.step()

    with watched.sessions.begin() as session:
        runs.start(session, session.get_one(Project, watched.world.project_id), params={}, created_by="ada")
    watched.end(NOW - 2 * HOUR, state="failed")
    assert watched.step()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"daily_at": "25:00"}, "HH:MM"),
        ({"kind": "speculator"}, "should be 'sft', 'dpo' or 'kto'"),
        ({"examples": -1}, "greater than or equal"),
        ({"weekly": 1}, "known: kind, examples"),
    ],
)
def test_nonsense_is_refused_where_it_is_said(watched: Watched, config: dict[str, object], message: str) -> None:
    with pytest.raises(projects.InvalidRequest, match=message):
        watched.when(**config)


def test_parameters_in_the_configuration_are_checked_for_every_kind(watched: Watched) -> None:
    with watched.sessions.begin() as session:
        project = watched.world.project(session)
        with pytest.raises(projects.InvalidRequest, match="beta"):
            projects.configure(session, project, {"train": {"dpo": {"beta": -1}}})
        with pytest.raises(projects.InvalidRequest, match="known: rank"):
            projects.configure(session, project, {"train": {"learning": 1}})
        projects.configure(session, project, {"train": {"lr": 0.01, "dpo": {"beta": 0.3}}})
        run = runs.start(session, project, params={"epochs": 2}, created_by="ada", kind="dpo")
    assert (run.params["beta"], run.params["epochs"]) == (0.3, 2)
    assert run.params["lr"] != 0.01
