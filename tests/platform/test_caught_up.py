"""What an upgrade does to rows of before: replays of what measures, words on runs, the users of a canary under way."""

from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session

from migrations.run import configuration, downgrade, upgrade
from services.platform.postgres import PostgresServer
from services.store import project_config, rollout_counts, run_params, runs
from services.store.base import Sessions, make_sessions
from services.store.evaluation_config import BASE_ABILITY
from services.store.models import Artifact, DeploymentEvent, Project, Rollout, RolloutCount, Run

REVISION = "2026_11_30_caught_up"
LATER = datetime(2026, 11, 20, 9, tzinfo=UTC)


class Old:
    """A database of the release before, with a project."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sessions: Sessions = make_sessions(url)
        with self.sessions.begin() as session:
            project = Project(slug="support", name="Support")
            session.add(project)
            session.flush()
            self.project_id = project.id

    def upgrade(self) -> None:
        upgrade(self.url, REVISION)

    def project(self) -> Project:
        with self.sessions() as session:
            return session.get_one(Project, self.project_id)

    def configure(self, **config: object) -> None:
        with self.sessions.begin() as session:
            session.get_one(Project, self.project_id).config = config

    def run(self, state: str, phase: str = "training", kind: str = "sft", **params: object) -> UUID:
        with self.sessions.begin() as session:
            return self._run(session, state, phase, kind, params)

    def _run(self, session: Session, state: str, phase: str, kind: str, params: dict[str, object]) -> UUID:
        run = Run(
            project_id=self.project_id, kind=kind, state=state, phase=phase, params=params, created_by="me",
            error="it died" if state == "failed" else None,
        )  # fmt: skip
        session.add(run)
        session.flush()
        return run.id

    def made(self, digest: str, weights: str, state: str, phase: str) -> UUID:
        """A run, and what it made, which came to be `weights` at a certain moment."""
        with self.sessions.begin() as session:
            run_id = self._run(session, state, phase, "sft", {})
            session.add(Artifact(digest=digest, kind="adapter", project_id=self.project_id, base_digest="b",
                                 manifest={}, state=weights, run_id=run_id))  # fmt: skip
            session.flush()
            session.get_one(Run, run_id).artifact_digest = digest
            session.add(DeploymentEvent(project_id=self.project_id, at=LATER, kind="flip", generation=2,
                                        from_digest=None, to_digest=digest, actor="me", reason="r"))  # fmt: skip
            return run_id

    def read(self, run_id: UUID) -> Run:
        with self.sessions() as session:
            return runs.get(session, run_id)


@pytest.fixture
def old(postgres: PostgresServer) -> Iterator[Old]:
    url = postgres.create_database("test_caught_up")
    before = ScriptDirectory.from_config(configuration(url)).get_revision(REVISION).down_revision
    assert isinstance(before, str)
    upgrade(url, before)
    made = Old(url)
    try:
        yield made
    finally:
        made.sessions.kw["bind"].dispose()
        postgres.drop_database("test_caught_up")


def test_a_project_that_replayed_the_measure_can_be_configured_again(old: Old) -> None:
    measured = {"replay_from": BASE_ABILITY, "lr": 0.001}
    old.configure(tags=["a"], train={**measured, "sft": measured, "dpo": measured, "kto": {"replay_from": "older"}})
    old.upgrade()
    config = old.project().config
    kept = {"lr": 0.001}
    assert config == {"tags": ["a"], "train": {**kept, "sft": kept, "dpo": kept, "kto": {"replay_from": "older"}}}
    assert project_config.checked({**config, "tags": ["b"]})["tags"] == ["b"]


@pytest.mark.parametrize("kind", run_params.ADAPTER_KINDS)
@pytest.mark.parametrize("state", ["queued", "running", "failed", "cancelled"])
def test_a_run_that_was_to_replay_the_measure_goes_on_and_is_tried_again(old: Old, state: str, kind: str) -> None:
    told = run_params.PARAMS[kind]().model_dump(mode="json") | {"lr": 0.002}
    run_id = old.run(state, kind=kind, **(told | {"replay_from": BASE_ABILITY}))
    old.upgrade()
    assert run_params.adapter_params(kind, old.read(run_id).params).model_dump(mode="json") == told
    if state == "failed":
        with old.sessions.begin() as session:
            assert runs.retry(session, runs.get(session, run_id), "ada").params == told


def test_what_succeeded_goes_on_saying_what_it_was_told_and_other_replays_stay(old: Old) -> None:
    taught = old.run("succeeded", replay_from=BASE_ABILITY)
    other = old.run("failed", replay_from="older")
    old.upgrade()
    assert old.read(taught).params == {"replay_from": BASE_ABILITY}
    assert old.read(other).params == {"replay_from": "older"}


@pytest.mark.parametrize(
    ("weights", "state", "phase", "said"),
    [
        ("retired", "succeeded", "live", "retired"),
        ("rolled_back", "succeeded", "live", "rolled back"),
        ("quarantined", "succeeded", "canary", "quarantined"),
        ("live", "failed", "failed", "live"),
        ("canary", "cancelled", "cancelled", "canary"),
        ("retired", "failed", "superseded", "retired"),
    ],
)
def test_a_run_says_where_its_weights_are_by_now(old: Old, weights: str, state: str, phase: str, said: str) -> None:
    run_id = old.made("d" * 64, weights, state, phase)
    old.upgrade()
    run = old.read(run_id)
    assert (run.state, run.phase, run.error) == ("succeeded", said, None)
    with old.sessions() as session:
        [event] = runs.events(session, run_id)
    assert (event.kind, event.payload, event.at) == ("phase", {"phase": said}, LATER)


@pytest.mark.parametrize(
    ("weights", "state", "phase"),
    [
        ("live", "succeeded", "live"),
        ("retired", "succeeded", "stopped"),
        ("quarantined", "failed", "quarantined"),
        ("quarantined", "failed", "failed"),
        ("rejected", "succeeded", "refused"),
        ("staged", "failed", "superseded"),
        ("live", "running", "deploying"),
    ],
)
def test_what_a_run_says_rightly_stays(old: Old, weights: str, state: str, phase: str) -> None:
    run_id = old.made("d" * 64, weights, state, phase)
    old.upgrade()
    run = old.read(run_id)
    assert (run.state, run.phase) == (state, phase)
    with old.sessions() as session:
        assert runs.events(session, run_id) == []


def test_a_canary_under_way_keeps_the_users_it_has_counted(old: Old) -> None:
    old.made("d" * 64, "canary", "succeeded", "canary")
    with old.sessions.begin() as session:
        rollout = Rollout(project_id=old.project_id, digest="d" * 64, stage="canary", generation=2, share=0.5,
                          salt="s", config={})  # fmt: skip
        session.add(rollout)
        session.flush()
        rollout_id = rollout.id
        for arm, unit, n, failed in (("canary", "u1", 3, 1.0), ("canary", "u2", 2, 0.0), ("control", "u3", 5, 0.0)):
            for metric, total in (("errors", failed), ("length", 2.0)):
                session.add(RolloutCount(rollout_id=rollout_id, metric=metric, arm=arm, unit=unit, n=n, total=total))

    def counted() -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        with old.sessions() as session:
            found = rollout_counts.moments(session, rollout_id)
        return {
            name: ((one.canary.users, one.canary.n), (one.control.users, one.control.n)) for name, one in found.items()
        }

    old.upgrade()
    assert counted()[rollout_counts.ROUTED] == counted()["errors"] == ((2, 5), (1, 5))
    downgrade(old.url, "-1")
    assert rollout_counts.ROUTED not in counted()
    old.upgrade()
    assert counted()[rollout_counts.ROUTED] == ((2, 5), (1, 5))
