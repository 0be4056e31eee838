"""The loop as a script: configure a project, let it serve and be reviewed, train, and wait for the ending."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx

from examples.grammars.common import Message, stream
from examples.grammars.simulate import APPLICATIONS
from examples.loop.people import App, Reviewer
from examples.loop.platform import Platform
from examples.loop.turbo import PROBE

REVIEW_SECONDS = 240
UNFINISHED = ("queued", "running")
# Enough plain answers to compare with, and a trial that a minute's traffic decides. Heads are trained once, when the
# new weights have answered for a while: the usual cadence, by tokens, could begin in the middle of the adapter's run.
SPECULATION = {
    "baseline_share": 0.33,
    "canary_share": 0.45,
    "canary_requests": 20,
    "first_tokens": 1_000_000_000,
}
# Some hundred requests, the new weights' first: a minute on two cores, and still enough held out to judge by.
HEADS = {"max_tokens": 80_000}
WARM_REQUESTS = 50
PROBE_SEED = 1
# Gateways hear of a change within a second; some traffic with live heads then comes before the probe.
GATEWAY_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One loop. `judgements` is where the reviewers stop: held-out items take two of them.

    Traffic comes at `review_rate` requests a second until the reviewers are done, then at `rate`. With `probe` above 0
    so many prompts are timed one after the other at each stage, and heads are trained and tried for the new weights.
    """

    application: str = "entities"
    clients: int = 4
    review_rate: float = 14.0
    rate: float = 5.0
    reviewers: int = 2
    judgements: int = 620
    window_seconds: int = 8
    held_out_share: float = 0.25
    calm_seconds: float = 20.0
    run_seconds: float = 420.0
    train: dict[str, Any] | None = None
    probe: int = 0
    heads_seconds: float = 120.0
    trial_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What is happening now, for whoever draws it; during a run, `stage` is the run's phase."""

    stage: str
    done: int
    total: int


Tell = Callable[[Progress], None]


class LoopError(RuntimeError):
    """The loop could not be completed: nothing to review, or a run that never ended."""


def configure(platform: Platform, plan: Plan) -> None:
    """Short sampling windows, so that a few minutes hold several of them."""
    config: dict[str, Any] = {
        "window_seconds": plan.window_seconds,
        "window_grace_seconds": 2,
        "review_budget": plan.judgements,
        "held_out_share": plan.held_out_share,
        # One loop of a few minutes shows the swap itself: a canary would wait for users' feedback, which nobody gives.
        "rollout": {"mode": "direct"},
    }
    if plan.train:
        config["train"] = plan.train
    if plan.probe:
        config["speculation"] = SPECULATION
    with platform.admin() as admin:
        admin.patch(f"/api/projects/{plan.application}", json={"config": config}).raise_for_status()


@contextmanager
def reviewers(platform: Platform, plan: Plan) -> Iterator[list[Reviewer]]:
    """Invited through the admin API, signed in through their one-time links."""
    people: list[Reviewer] = []
    with platform.admin() as admin:
        for number in range(1, plan.reviewers + 1):
            body = {
                "email": f"reviewer{number}@example.org", "name": f"Reviewer {number}",
                "role": "reviewer", "project": plan.application,
            }  # fmt: skip
            answer = admin.post("/api/users", json=body)
            answer.raise_for_status()
            link = urlsplit(answer.json()["sign_in_url"]).path
            people.append(Reviewer(platform.console_url, link, plan.application, plan.application))
    try:
        yield people
    finally:
        for person in people:
            person.close()


def review(people: list[Reviewer], plan: Plan, tell: Tell) -> int:
    """All reviewers at once until `plan.judgements` are in. Returns how many were corrections."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(person: Reviewer) -> None:
        while not stop.is_set():
            try:
                person.work(stop)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                failures.append(error)
                stop.set()

    threads = [threading.Thread(target=work, args=(person,), daemon=True) for person in people]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + REVIEW_SECONDS
    while not stop.is_set() and time.monotonic() < deadline:
        judged = sum(person.counts.reviewed for person in people)
        tell(Progress("review", judged, plan.judgements))
        if judged >= plan.judgements:
            break
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join(30)
    if failures:
        raise LoopError(f"a reviewer failed: {failures[0]}") from failures[0]
    if not any(person.counts.reviewed for person in people):
        raise LoopError(f"nothing came up for review within {REVIEW_SECONDS} s")
    return sum(person.counts.corrected for person in people)


def train(platform: Platform, plan: Plan, tell: Tell) -> UUID:
    """Press "Train now" and wait until the run has ended, however it ended."""
    with platform.admin() as admin:
        answer = admin.post(f"/api/p/{plan.application}/runs", json={})
        answer.raise_for_status()
        run_id = UUID(answer.json()["id"])
        for run, step, steps in _events(admin, run_id, plan.run_seconds):
            tell(Progress(run["phase"], step, steps))
            if run["state"] not in UNFINISHED:
                return run_id
    raise LoopError(f"run {run_id} had not ended after {plan.run_seconds:.0f} s")


def _events(admin: httpx.Client, run_id: UUID, seconds: float) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The run as it is now, with its phase's step and steps, again and again for so long."""
    deadline = time.monotonic() + seconds
    step, steps, seen = 0, 0, 0
    while time.monotonic() < deadline:
        run = admin.get(f"/api/runs/{run_id}", params={"after": seen}).raise_for_status().json()
        for event in run["events"]:
            seen = event["id"]
            if event["kind"] == "phase":
                step, steps = 0, 0
            if event["kind"] == "progress":
                step, steps = event["payload"].get("step", 0), event["payload"].get("steps", 0)
        yield run, step, steps
        time.sleep(0.4)


def train_heads(platform: Platform, plan: Plan, tell: Tell) -> bool:
    """Train heads for what serves now; whether they passed the gate. A run that takes too long is cancelled."""
    with platform.admin() as admin:
        answer = admin.post(f"/api/p/{plan.application}/runs", json={"kind": "speculator", "params": HEADS})
        run_id = UUID(answer.raise_for_status().json()["id"])
        for run, step, steps in _events(admin, run_id, plan.heads_seconds):
            tell(Progress("heads", step, steps))
            if run["state"] not in UNFINISHED:
                return bool(run["state"] == "succeeded" and run["phase"] != "refused")
        admin.post(f"/api/runs/{run_id}/cancel")
    return False


def try_heads(platform: Platform, plan: Plan, tell: Tell) -> bool:
    """Wait for the trial's verdict on traffic, for a bounded time; whether the heads are live."""
    started = time.monotonic()
    with platform.admin() as admin:
        while (passed := time.monotonic() - started) < plan.trial_seconds:
            tell(Progress("trial", int(passed), int(plan.trial_seconds)))
            heads = admin.get(f"/api/p/{plan.application}/speculator").raise_for_status().json()
            if heads["canary"] is None:
                return heads["live"] is not None
            time.sleep(1)
    return False


def wait_shipped(count_rows: Callable[[], int], sent: int) -> None:
    """Until Postgres holds every request the app saw answered; raises when rows are missing after 20 s."""
    deadline = time.monotonic() + 20
    while (rows := count_rows()) < sent:
        if time.monotonic() > deadline:
            raise LoopError(f"the app sent {sent} requests, Postgres has {rows}")
        time.sleep(0.2)


def run_loop(platform: Platform, plan: Plan, tell: Tell) -> tuple[UUID, App]:
    """Traffic from first to last; review, train and swap meanwhile. The app comes back stopped, with its counts."""
    configure(platform, plan)
    app = App(platform.gateway_url, platform.app_key, plan.application, clients=plan.clients, rate=plan.review_rate)
    probe = Probe(app, plan, tell)
    probe.run("start")
    app.start()
    try:
        if plan.probe:
            _wait_sent(app, WARM_REQUESTS)
            probe.run("warm")
        with reviewers(platform, plan) as people:
            review(people, plan, tell)
        app.rate = plan.rate
        run_id = train(platform, plan, tell)
        _serve_new(platform, plan, tell, app, probe)
    finally:
        app.stop()
    return run_id, app


class Probe:
    """The same measurement at every stage: unseen prompts, one stream at a time, while the app is quiet.

    No prompt comes twice, in or between stages: the suffix drafter would have its answer by heart.
    """

    def __init__(self, app: App, plan: Plan, tell: Tell) -> None:
        self._app, self._count, self._tell = app, plan.probe, tell
        self._prompts = stream(APPLICATIONS[plan.application], "held_out", PROBE_SEED)
        self._sent: set[str] = set()

    def run(self, stage: str) -> None:
        """Send this stage's prompts; the log tells them by their user."""
        if not self._count:
            return
        with self._app.quiet():
            for number in range(self._count):
                self._tell(Progress("probe", number, self._count))
                self._app.ask(self._next(), f"{PROBE}{stage}")

    def _next(self) -> list[Message]:
        while (prompt := str((messages := next(self._prompts).messages)[-1])) in self._sent:
            pass
        self._sent.add(prompt)
        return messages


def _serve_new(platform: Platform, plan: Plan, tell: Tell, app: App, probe: Probe) -> None:
    """Traffic on what serves now; with heads of its own, where they are wanted and worth it."""
    app.rate = plan.review_rate if plan.probe else plan.rate
    _linger(plan, tell)
    if not plan.probe:
        return
    probe.run("adapted")
    app.rate = plan.rate
    passed = train_heads(platform, plan, tell)
    app.rate = plan.review_rate
    if passed and try_heads(platform, plan, tell):
        time.sleep(GATEWAY_SECONDS)
        probe.run("heads")


def _wait_sent(app: App, count: int) -> None:
    """Until the app has had so many answers."""
    deadline = time.monotonic() + REVIEW_SECONDS
    while app.counts.sent < count:
        if time.monotonic() > deadline:
            raise LoopError(f"the app had {app.counts.sent} answers after {REVIEW_SECONDS} s")
        time.sleep(0.05)


def _linger(plan: Plan, tell: Tell) -> None:
    """Traffic on the new weights, so that there is something to compare."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < plan.calm_seconds:
        tell(Progress("serving", int(passed), int(plan.calm_seconds)))
        time.sleep(0.5)
