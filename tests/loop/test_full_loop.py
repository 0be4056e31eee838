"""The main path of docs/architecture.md, walked once on a real platform with the starter model.

The tests run in order on one platform: each leaves it serving for the next.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from openai import APIError, OpenAI
from redis import Redis
from sqlalchemy import func, select, update

from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from examples.loop.drive import Plan, Progress, run_loop
from examples.loop.platform import Platform, platform
from examples.loop.report import Report, collect
from services.settings import Settings
from services.store.base import Sessions, make_sessions
from services.store.models import (
    Artifact,
    Deployment,
    DeploymentEvent,
    Interaction,
    Job,
    Revision,
    Rollout,
    Run,
)
from whet_client.client import Whet

PLAN = Plan(clients=2, judgements=300, window_seconds=5, calm_seconds=6, run_seconds=900, train={"epochs": 4})
# Half of the users, and only what they say: how long answers are and take differs between the base and an adapter.
ON_TRIAL = {"mode": "canary", "share": 0.5, "guardrails": {"length": None, "latency": None, "ttft": None}}
BASE = {None, "", "base"}

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def running() -> Iterator[Platform]:
    with platform() as started:
        yield started


@pytest.fixture(scope="module")
def sessions(running: Platform) -> Sessions:
    return make_sessions(Settings(home=running.home).database_dsn)


@pytest.fixture(scope="module")
def told() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def report(running: Platform, sessions: Sessions, told: list[Progress]) -> Report:
    """One loop: traffic, review, training, gate, swap, more traffic."""
    run_id, app = run_loop(running, PLAN, told.append)
    assert app.counts.failed == 0, list(app.counts.errors)
    with sessions() as session:
        eventually(lambda: (session.scalar(select(func.count()).select_from(Interaction)) or 0) >= app.counts.sent)
        return collect(session, run_id, PLAN.application)


def eventually(happened: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.2)


def client(running: Platform) -> OpenAI:
    return OpenAI(base_url=f"{running.gateway_url}/v1", api_key=running.app_key, max_retries=0, timeout=30)


def ask(running: Platform, seed: int) -> tuple[str, str | None]:
    """One held-out prompt: its answer, and the digest that the response header says it came from."""
    messages = next(stream(APPLICATIONS["entities"], "held_out", seed)).messages
    with client(running) as openai:
        answer = openai.chat.completions.with_raw_response.create(
            model="entities", messages=messages, temperature=0, max_tokens=200
        )
    return answer.parse().choices[0].message.content or "", answer.headers.get("x-whet-adapter")


def test_the_loop_closes_and_held_out_answers_get_better(report: Report) -> None:
    assert report.decision == "promote", report.reasons
    assert report.swapped_at is not None
    assert report.held_out_after.low > report.held_out_before.high
    assert report.traffic_after.low > report.traffic_before.high


def test_no_request_failed_or_was_lost_while_learning(report: Report) -> None:
    assert report.rows_not_finished_well == 0
    assert report.gaps_swap.streams > 0


def test_old_and_new_weights_are_both_in_the_log_and_never_after_each_other(report: Report) -> None:
    new = [row.started for row in report.served if row.adapter == report.digest_after]
    old = [row.started for row in report.served if row.adapter == report.digest_before]
    assert new
    assert old
    assert (max(old) - min(new)).total_seconds() < 2


def test_progress_was_told_from_training_to_live(report: Report, told: list[Progress]) -> None:
    stages = {progress.stage for progress in told}
    assert {"review", "serving"} <= stages
    assert any(progress.total and progress.done for progress in told if progress.stage not in ("review", "serving"))


def test_a_revision_and_one_artefact_stand_behind_the_live_weights(report: Report, sessions: Sessions) -> None:
    with sessions() as session:
        run = session.scalars(select(Run).where(Run.kind == "sft")).one()
        artifact = session.scalars(select(Artifact).where(Artifact.kind == "adapter")).one()
        revision = session.get_one(Revision, run.revision_id)
    assert artifact.digest == report.digest_after == run.artifact_digest
    assert artifact.state == "live"
    assert revision.train_count >= report.train_examples > 0
    assert revision.looks == 1


def test_a_killed_engine_fails_what_it_was_running_and_comes_back_with_the_live_adapter(
    report: Report, running: Platform
) -> None:
    live, pids = ask(running, 3)[1], part_pids(running, "engine")
    with client(running) as openai:
        chunks = openai.completions.create(
            model="entities", prompt="Text:", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(chunks))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(APIError):
            list(chunks)

    eventually(lambda: _answers(running), 40)

    assert ask(running, 4)[1] == live


def test_a_roll_back_by_command_serves_the_base_and_the_deployment_history_says_so(
    report: Report, running: Platform, sessions: Sessions
) -> None:
    assert ask(running, 1)[1] == report.digest_after

    done = whet(running, "rollback", "entities", "--reason", "test")

    assert done.returncode == 0, done.stderr
    eventually(lambda: ask(running, 2)[1] in BASE, 5)
    with sessions() as session:
        kinds = session.scalars(select(DeploymentEvent.kind).order_by(DeploymentEvent.id)).all()
    assert kinds[-1] == "roll_back"


def test_a_killed_worker_and_an_emptied_redis_leave_one_more_artefact(
    report: Report, running: Platform, sessions: Sessions
) -> None:
    with running.admin() as admin:
        admin.patch("/api/projects/entities", json={"config": {"rollout": ON_TRIAL}}).raise_for_status()
    started = whet(running, "train", "entities", "--no-follow", "--param", "seed=7", "--param", "epochs=2")
    assert started.returncode == 0, started.stderr
    with sessions() as session:
        run_id = session.scalars(select(Run.id).where(Run.kind == "sft").order_by(Run.created_at.desc())).first()
    eventually(lambda: _phase(sessions, run_id) == "training", 180)

    for pid in part_pids(running, "trainer"):
        os.kill(pid, signal.SIGKILL)
    flush_redis(running)
    with sessions.begin() as session:  # a minute has passed: what is shown here is what comes after it
        session.execute(update(Job).where(Job.state == "running").values(lease_expires_at=func.now()))

    eventually(lambda: _state(sessions, run_id) == "succeeded", 900)
    with sessions() as session:
        artifacts = session.scalars(select(Artifact).where(Artifact.run_id == run_id)).all()
        attempts = session.scalars(select(Job.attempts).where(Job.kind == "train")).all()
    assert len(artifacts) == 1
    assert max(attempts) == 2


def test_what_passed_the_gate_serves_a_share_and_is_taken_back_when_its_users_object(
    report: Report, running: Platform, sessions: Sessions
) -> None:
    with sessions() as session:
        trial = session.scalars(select(Rollout)).one()
    assert (trial.stage, trial.share) == ("canary", 0.5)
    served: dict[str, set[str | None]] = {}

    connected = Whet(running.app_key, project="entities", gateway_url=running.gateway_url)
    with client(running) as openai, connected as said:
        prompts = stream(APPLICATIONS["entities"], "held_out", 6)
        for turn in range(40):
            for user in (f"user {number}" for number in range(40)):
                answer = openai.chat.completions.with_raw_response.create(
                    model="entities", messages=next(prompts).messages, temperature=0, max_tokens=8, user=user
                )
                adapter = answer.headers.get("x-whet-adapter")
                said.feedback(answer.parse().id, rating=-1 if adapter == trial.digest else 1)
                if turn == 0:
                    served.setdefault(user, set()).add(adapter)
            if trial_of(sessions, trial.id).stage != "canary":
                break

    ended = trial_of(sessions, trial.id)
    assert (ended.stage, ended.verdict["action"]) == ("rolled_back", "roll_back"), ended.verdict
    assert ended.verdict["signal"]["high"] < 0
    assert len({frozenset(digests) for digests in served.values()}) == 2
    assert all(len(digests) == 1 for digests in served.values())
    assert {ask(running, seed)[1] for seed in range(7, 12)} <= BASE
    with sessions() as session:
        event = session.scalars(select(DeploymentEvent).order_by(DeploymentEvent.id.desc())).first()
        artifact = session.scalars(select(Artifact).where(Artifact.digest == trial.digest)).one()
        row = session.get_one(Deployment, ended.project_id)
    assert event is not None
    assert event.evidence
    assert (artifact.state, row.canary_digest, row.automatic_rollbacks) == ("rolled_back", None, 1)


def part_pids(running: Platform, name: str) -> list[int]:
    """The part's own processes, without the guard that would tell the supervisor."""
    guard = json.loads((Settings(home=running.home).sockets / "platform.json").read_text())["parts"][name]["guard"]
    return [process.pid for process in psutil.Process(guard).children(recursive=True)]


def flush_redis(running: Platform) -> None:
    with Redis(unix_socket_path=str(Settings(home=running.home).sockets / "redis.sock")) as redis:
        redis.flushall()


def _answers(running: Platform) -> bool:
    try:
        ask(running, 5)
    except APIError:
        return False
    return True


def trial_of(sessions: Sessions, trial_id: UUID) -> Rollout:
    with sessions() as session:
        return session.get_one(Rollout, trial_id)


def _phase(sessions: Sessions, run_id: UUID | None) -> str:
    with sessions() as session:
        return session.get_one(Run, run_id).phase


def _state(sessions: Sessions, run_id: UUID | None) -> str:
    with sessions() as session:
        run = session.get_one(Run, run_id)
        assert run.state not in ("failed", "cancelled"), run.error
        return run.state


def whet(running: Platform, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).parent / "whet"), *arguments]
    environment = os.environ | {"WHET_HOME": str(running.home)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
