"""kill -9 of every process at every named place of a run and of a swap, on a whole platform under traffic.

    python -m benchmarks.learning_kills [--times 5] [--only train.,deploy.] [--out FILE]

A case orders the worker to hold at a failpoint, kills trainer, worker, dispatcher, engine or gateway there, lets go,
and waits for the ending. Then there must be one artefact of the run, one live digest that row, history and engine
agree on, and every answer an app received to its end must be in Postgres, by its id. Places of a run are walked by
short runs of their own, places of a swap by deploying two evaluated adapters in turns, in mode "direct". The trainer is
killed as it starts and after more and more steps.
"""

import argparse
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import psutil
from sqlalchemy import func, select, update

from benchmarks.landed import missing
from benchmarks.learning_cells import Cell
from examples.loop.drive import Plan, configure, review, reviewers
from examples.loop.people import App
from examples.loop.platform import Platform, platform
from services.settings import Settings
from services.store import deployments, jobs, projects
from services.store.base import Sessions, make_sessions
from services.store.models import Artifact, Deployment, DeploymentEvent, Job, Run, RunEvent

ROOT = Path(__file__).parents[1]
SOURCES = (
    "worker/tasks.py", "worker/training/run.py", "worker/gate/evaluate.py", "worker/gate/asking.py",
    "worker/rollout/swap.py", "worker/rollout/reconcile.py",
)  # fmt: skip
ALL_THE_TIME = ("reconcile.",)  # come by at every look at the engine, which may be after the swap is over
OF_A_SWAP = ("deploy.", "probe.", *ALL_THE_TIME)
PARTS = {"run": ("job.", "train.", "evaluate."), "swap": OF_A_SWAP}
NEVER_HERE = ("reconcile.retreating",)  # needs an artefact that no engine can load; tests/rollout goes there
VICTIMS = ("worker", "dispatcher", "engine", "gateway", "trainer")
PLAN = Plan(clients=2, review_rate=10.0, rate=2.0, judgements=300, window_seconds=5)
TEACHING = {"epochs": 4}
SHORT = {"max_steps": 3}
LONG = {"max_steps": 30, "checkpoint_steps": 5}
TRAINER_STEPS = (0, 3, 7, 14, 24)  # of LONG's; 0: as soon as the process is there
CASE_SECONDS = 600.0
TEACHING_SECONDS = 900.0
AFTERWARDS_SECONDS = 5.0  # what follows a swap's last commit: the place behind it, and the engine's confirmation
TRIES = 3  # at a place that went by too fast


class Case(NamedTuple):
    """One kill."""

    point: str
    victim: str
    turn: int


class Outcome(NamedTuple):
    """`wrong` says what does not hold afterwards; empty when all does. `reached`: whether the place was come by."""

    case: Case
    seconds: float
    reached: bool
    wrong: list[str]


def points() -> list[str]:
    """The failpoints of a run and of a swap, as the code names them, in the order they are come by."""
    found = [name for source in SOURCES for name in re.findall(r'reach\("([^"]+)"\)', (ROOT / source).read_text())]
    return [name for name in dict.fromkeys(found) if name not in NEVER_HERE]


def cases(times: int, only: Sequence[str]) -> list[Case]:
    """Every place with every victim. The trainer lives only while the run is training, so it dies there."""
    chosen = [point for point in points() if not only or point.startswith(tuple(only))]
    listed = [
        Case(point, victim, turn)
        for turn in range(times)
        for point, victim in itertools.product(chosen, VICTIMS)
        if victim != "trainer"
    ]
    if not only or any("train.".startswith(prefix) for prefix in only):
        listed += [Case("training", "trainer", turn) for turn in range(times)]
    return listed


class Arena:
    """A platform with two evaluated adapters, traffic, and the means to hold and kill."""

    def __init__(self, running: Platform, order: Path) -> None:
        self.running = running
        self.settings = Settings(home=running.home)
        self.sessions: Sessions = make_sessions(self.settings.database_dsn)
        self.project = PLAN.application
        self._order = order
        self._seeds = itertools.count(100)
        with self.sessions() as session:
            self.project_id: UUID = projects.get(session, self.project).id

    # --- killing ---

    def arm(self, point: str) -> None:
        self._order.write_text(f"{point} hold", encoding="utf-8")

    @property
    def reached(self) -> Path:
        return self._order.with_name(f"{self._order.name}.reached")

    def disarm(self) -> None:
        self._order.unlink(missing_ok=True)
        self.reached.unlink(missing_ok=True)

    def kill(self, victim: str) -> bool:
        """Whether a process died of it."""
        parts = ("worker", "trainer") if victim == "worker" else (victim,)
        pids = self.trainers() if victim == "trainer" else [pid for part in parts for pid in self._part(part)]
        killed = 0
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                continue
        return killed > 0

    def _part(self, name: str) -> list[int]:
        """The part's own processes, without the guard that would tell the supervisor."""
        state = json.loads((self.settings.sockets / "platform.json").read_text())
        return [one.pid for one in psutil.Process(state["parts"][name]["guard"]).children(recursive=True)]

    def step_of(self, run_id: UUID) -> int:
        """The last step that a run's trainer told of; −1 while there is no trainer."""
        with self.sessions() as session:
            told = session.scalar(select(func.max(RunEvent.step)).where(RunEvent.run_id == run_id))
        return told if told is not None else 0 if self.trainers() else -1

    def trainers(self) -> list[int]:
        found = [psutil.Process(pid) for pid in self._part("trainer")]
        return [one.pid for one in found if "worker.training.lora" in one.cmdline()]

    # --- work ---

    def start_run(self, params: dict[str, Any]) -> UUID:
        body = {"params": {**params, "seed": next(self._seeds)}}
        with self.running.admin() as admin:
            answer = _again(lambda: admin.post(f"/api/p/{self.project}/runs", json=body))
        return UUID(answer.json()["id"])

    def deploy(self, digest: str) -> UUID:
        """As a person's deployment of an evaluated artefact."""
        with self.sessions.begin() as session:
            payload = {"project_id": str(self.project_id), "digest": digest}
            return jobs.enqueue(session, "deploy", payload, project_id=self.project_id).id

    def run_over(self, run_id: UUID) -> bool:
        with self.sessions() as session:
            return session.get_one(Run, run_id).state not in ("queued", "running")

    def job_over(self, job_id: UUID) -> bool:
        with self.sessions() as session:
            return session.get_one(Job, job_id).state not in ("queued", "running")

    def end_leases(self) -> None:
        """A minute passes for jobs whose worker has just been killed. That leases run out, the ledger's tests show."""
        with self.sessions.begin() as session:
            session.execute(update(Job).where(Job.state == "running").values(lease_expires_at=func.now()))

    # --- what must hold ---

    def wrong_of_run(self, run_id: UUID) -> list[str]:
        with self.sessions() as session:
            run = session.get_one(Run, run_id)
            made = session.scalars(select(Artifact.digest).where(Artifact.run_id == run_id)).all()
            waiting = session.scalars(
                select(Job.kind).where(
                    Job.state.in_(("queued", "running")), Job.payload["run_id"].as_string() == str(run_id)
                )
            ).all()
        wrong = [] if run.state == "succeeded" else [f"the run ended {run.state}: {run.error}"]
        if len(made) != 1 or run.artifact_digest not in made:
            wrong.append(f"{len(made)} artefacts of one run")
        return wrong + [f"a {kind} job of a finished run is unfinished" for kind in waiting]

    def wrong_of_swap(self, job_id: UUID, digest: str) -> list[str]:
        with self.sessions() as session:
            job = session.get_one(Job, job_id)
            flips = session.scalars(
                select(DeploymentEvent).where(DeploymentEvent.project_id == self.project_id)
                .where(DeploymentEvent.kind.in_(("flip", "roll_back"))).order_by(DeploymentEvent.id)
            ).all()  # fmt: skip
        wrong = [] if job.state == "succeeded" else [f"the deployment ended {job.state}: {job.error}"]
        if flips[-1].to_digest != digest or (len(flips) > 1 and flips[-2].to_digest == digest):
            wrong.append("the history does not show one flip to what was deployed")
        return wrong

    def wrong_of_deployment(self) -> list[str]:
        """One live digest: the row's, the artefacts', and what an answer says it came from."""
        with self.sessions() as session:
            row = session.get_one(Deployment, self.project_id)
            live = session.scalars(
                select(Artifact.digest).where(Artifact.project_id == self.project_id)
                .where(Artifact.kind == "adapter", Artifact.state == "live")
            ).all()  # fmt: skip
        if live != ([row.active_digest] if row.active_digest else []):
            return [f"{len(live)} live digests, the row has {row.active_digest}"]
        served = _until(lambda: self._served() == (row.active_digest or "base"), 60)
        return [] if served else [f"answers come from {self._served()}, the row has {row.active_digest}"]

    def _served(self) -> str:
        body = {"model": self.project, "messages": [{"role": "user", "content": "Note: Ada."}], "max_tokens": 2}
        headers = {"authorization": f"Bearer {self.running.app_key}"}
        try:
            answer = httpx.post(
                f"{self.running.gateway_url}/v1/chat/completions", json=body, headers=headers, timeout=20
            )
        except httpx.HTTPError as error:
            return repr(error)
        return str(answer.headers.get("x-whet-adapter", f"status {answer.status_code}"))


def walk(arena: Arena, pair: Sequence[str], case: Case) -> Outcome:
    """One case from arming to the verdict."""
    began = time.monotonic()
    if case.point.startswith(OF_A_SWAP):
        digest = next(one for one in pair if one != _active(arena))
        if case.point.startswith(ALL_THE_TIME):  # the swap goes first, or it is held before there is one
            job_id = arena.deploy(digest)
            arena.arm(case.point)
        else:
            arena.arm(case.point)
            job_id = arena.deploy(digest)
        reached, over = _strike(arena, case, arena.reached.exists, lambda: arena.job_over(job_id))
        wrong = arena.wrong_of_swap(job_id, digest)
    else:
        training = case.point == "training"
        if not training:
            arena.arm(case.point)
        run_id = arena.start_run(LONG if training else SHORT)
        step = TRAINER_STEPS[case.turn % len(TRAINER_STEPS)]
        there = (lambda: arena.step_of(run_id) >= step) if training else arena.reached.exists
        reached, over = _strike(arena, case, there, lambda: arena.run_over(run_id))
        wrong = arena.wrong_of_run(run_id)
    wrong += arena.wrong_of_deployment()
    if not over:
        wrong.append(f"no ending within {CASE_SECONDS:.0f} s")
    return Outcome(case, round(time.monotonic() - began, 1), reached, wrong)


def _strike(arena: Arena, case: Case, there: Callable[[], bool], over: Callable[[], bool]) -> tuple[bool, bool]:
    """Wait for the place, kill there, let go, wait for the ending."""
    reached = _until(lambda: there() or over(), CASE_SECONDS) and _until(there, AFTERWARDS_SECONDS)
    if reached:
        reached = arena.kill(case.victim)
        if case.victim == "worker":
            arena.end_leases()
    arena.disarm()
    return reached, _until(over, CASE_SECONDS)


def _active(arena: Arena) -> str | None:
    with arena.sessions() as session:
        return deployments.get(session, arena.project_id).active_digest


def _until(happened: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _again(ask: Callable[[], httpx.Response]) -> httpx.Response:
    """The console may be starting a transaction against a Postgres that is busy; a person would press again."""
    for _ in range(20):
        try:
            answer = ask()
            if answer.status_code < 500:
                return answer.raise_for_status()
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError("the console does not answer")


@contextmanager
def arena(order: Path) -> Iterator[tuple[Arena, list[str], App]]:
    """A platform that has learned something once: two adapters to swap, and an app that goes on asking."""
    with platform(WHET_FAILPOINT=f"@{order}") as running:
        made = Arena(running, order)
        configure(running, PLAN)
        with running.admin() as admin:
            config = {"config": {"rollout": {"mode": "direct"}}}
            admin.patch(f"/api/projects/{PLAN.application}", json=config).raise_for_status()
        app = App(running.gateway_url, running.app_key, PLAN.application, clients=2, rate=PLAN.review_rate)
        app.start()
        try:
            with reviewers(running, PLAN) as people:
                review(people, PLAN, lambda _: None)
            app.rate = PLAN.rate
            yield made, [_taught(made) for _ in range(2)], app
        finally:
            app.stop()


def _taught(made: Arena) -> str:
    """An adapter the gate has compared with the base; deployed over it. What served before is retired."""
    with made.sessions.begin() as session:
        deployment = deployments.get(session, made.project_id)
        if deployment.active_digest is not None:
            deployments.flip(
                session, made.project_id, expected_generation=deployment.generation, digest=None, actor="benchmark",
                reason="the next one is compared with the base as well",
            )  # fmt: skip
    run_id = made.start_run(TEACHING)
    if not _until(lambda: made.run_over(run_id), TEACHING_SECONDS):
        raise RuntimeError("the first run did not end")
    with made.sessions.begin() as session:
        run = session.get_one(Run, run_id)
        if run.artifact_digest is None or run.phase != "live":
            raise RuntimeError(f"the first run ended {run.phase}: {run.error}")
        return run.artifact_digest


class Walked(NamedTuple):
    """Outcomes; answers the app received whole, and how many of them are not in Postgres."""

    outcomes: list[Outcome]
    answers: int
    lost: int


def measure(times: int, only: Sequence[str]) -> Walked:
    """Every case, one after the other on one platform."""
    outcomes = []
    with (
        tempfile.TemporaryDirectory(prefix="whet-kills-") as directory,
        arena(Path(directory) / "order") as (made, pair, app),
    ):
        for case in cases(times, only):
            for _ in range(TRIES):
                outcome = walk(made, pair, case)
                _print(outcome)
                if outcome.reached or outcome.wrong:
                    break
            outcomes.append(outcome)
        app.stop()
        return Walked(outcomes, len(app.counts.answered), len(missing(made.sessions, app.counts.answered)))


def kills(part: str, scale: float) -> Cell:
    """A line of the table."""
    return cell(part, measure(max(1, round(5 * scale)), PARTS[part]))


def cell(part: str, walked: Walked) -> Cell:
    outcomes, answers, lost = walked
    bad = [one for one in outcomes if one.wrong]
    killed = [one for one in outcomes if one.reached]
    late = len(outcomes) - len(killed)
    measured = (
        f"{len(killed)} kills at {len({one.case.point for one in killed})} places: {len(bad)} left something wrong"
        f"{f', {late} more came too late' if late else ''}; {answers:,} answers received, {lost} not logged"
    )
    raw = {
        "outcomes": [[*one.case, one.seconds, one.reached, one.wrong] for one in outcomes],
        "answers": answers,
        "lost": lost,
    }
    victims = f"{'trainer, ' if part == 'run' else ''}worker, dispatcher, engine, gateway"
    return Cell(
        f"kill -9 of {victims} at each failpoint of a {part}",
        "one artefact, one live digest, no lost request", measured, not bad and not lost and not late, raw,
    )  # fmt: skip


def _print(outcome: Outcome) -> None:
    case = outcome.case
    verdict = "; ".join(outcome.wrong) or ("well" if outcome.reached else "not reached")
    print(f"{case.point:24} {case.victim:12} {case.turn}  {outcome.seconds:6.1f} s  {verdict}", flush=True)


CELLS: dict[str, Callable[[float], Cell]] = {part: partial(kills, part) for part in PARTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", default="", help="prefixes of failpoints, with commas between them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    done = cell("run or swap", measure(options.times, [part for part in options.only.split(",") if part]))
    print(done.measured)
    if options.out:
        options.out.write_text(json.dumps(done._asdict(), indent=1) + "\n", encoding="utf-8")
    return 0 if done.met else 1


if __name__ == "__main__":
    sys.exit(main())
