"""The demo's figures on speed: which rows they count, how they compare them, and what they say of heads."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import UUID

import pytest
from sqlalchemy.orm import Session

from examples.demo import turbo_rows
from examples.loop.drive import Plan, Probe, Progress
from examples.loop.people import App
from examples.loop.picture import draw
from examples.loop.report import Gaps, Report, Served, wilson
from examples.loop.turbo import Pair, Rate, Timed, Turbo, measure, pair, rate, stages
from services.store import partitions, projects, runs, speculators
from services.store.base import Sessions
from services.store.models import Artifact, Project
from services.store.speculators import Decision
from tests.console.seed_speed import answer, heads

NOW = datetime.now(UTC)


@pytest.fixture
def project(sessions: Sessions) -> UUID:
    with sessions.begin() as session:
        partitions.ensure(session)
        return projects.create(session, "entities", "Entities").id


@pytest.fixture
def told(sessions: Sessions, project: UUID) -> Callable[[], Turbo]:
    def read() -> Turbo:
        with sessions() as session:
            return measure(session, project)

    return read


def timed(value: float, *, drafted: bool = True, probe: str | None = None, at: int = 0) -> Timed:
    return Timed(NOW + timedelta(seconds=at), value, drafted, probe, None)


def test_a_rate_is_the_median_with_its_quartiles_and_nothing_without_answers() -> None:
    assert rate([100.0, 200.0, 300.0, 400.0, 500.0]) == Rate(300, 200, 400, 5)
    assert rate([]) is None


def test_drafted_answers_are_compared_with_those_of_the_same_time_that_were_not() -> None:
    found = pair([timed(100, drafted=False), timed(220), timed(180)])
    assert found.times == pytest.approx(2.0)
    assert str(found) == "200 (190 to 210, n = 2), without drafts 100 (100 to 100, n = 1): 2.00 ×"


def test_without_a_baseline_nothing_is_said_to_be_faster() -> None:
    assert pair([timed(220)]).times is None
    assert str(pair([timed(220)])).endswith("without drafts none")
    assert str(Pair(None, None)) == "none, without drafts none"


def test_stages_come_in_their_order_and_hold_their_own_probe_alone() -> None:
    rows = [timed(300, probe="heads", at=9), timed(100, probe="start"), timed(999, at=1), timed(120, probe="start")]
    found = stages(rows)
    assert [(stage.name, stage.rates.drafted) for stage in found] == [
        ("start", Rate(110, 105, 115, 2)),
        ("heads", Rate(300, 300, 300, 1)),
    ]


def test_rates_come_from_the_log_by_weights_probe_and_drafting(
    sessions: Sessions, project: UUID, told: Callable[[], Turbo]
) -> None:
    dice = random.Random(1)
    with sessions.begin() as session:
        owner = session.get_one(Project, project)

        def log(value: float, **values: object) -> None:
            row = {"speculation": None, "rate": value, "tokens": 40} | values
            session.add(answer(owner, NOW, dice, **row))  # type: ignore[arg-type]

        log(50, speculated=False)
        log(150)
        log(90, adapter="a" * 64)
        log(400, end_user="probe-start")
        log(9, tokens=7)
        log(9, finish_reason="cancelled")
        log(9, origin="evaluation")
    found = told()
    assert found.before.times == pytest.approx(3.0)
    assert found.after.drafted is not None
    assert found.after.drafted.median == pytest.approx(90)
    assert found.after.plain is None
    assert [(stage.title, round(stage.rates.drafted.median)) for stage in found.stages if stage.rates.drafted] == [
        ("at the start (base)", 400)
    ]
    assert len(found.timed) == 4


def run_heads(session: Session, project: UUID, phase: str) -> str:
    owner = session.get_one(Project, project)
    run = runs.start(session, owner, params={}, created_by="test", kind="speculator")
    run.artifact_digest = heads(session, owner, "tried")
    session.get_one(Artifact, run.artifact_digest).run_id = run.id
    runs.finish(session, run, "succeeded", phase)
    return run.artifact_digest


def test_heads_that_went_live_are_told_with_their_trial(
    sessions: Sessions, project: UUID, told: Callable[[], Turbo]
) -> None:
    assert told().heads == "not trained"
    with sessions.begin() as session:
        digest = run_heads(session, project, "canary")
        speculators.stage_canary(session, project, digest, 0.5, Decision("rollout", "passed", {}))
    assert "undecided" in told().heads
    with sessions.begin() as session:
        decision = Decision("rollout", "better", {"tokens_per_step": [3.5, 2.25]})
        speculators.go_live(session, project, digest, decision)
    assert told().heads_live_at is not None
    assert "tokens a step 3.50 against 2.25 on trial" in told().heads
    with sessions.begin() as session:
        speculators.roll_back(session, project, Decision("rollout", "slower than without", {}))
    assert told().heads.endswith("then left: slower than without")


def test_heads_that_were_refused_or_withdrawn_are_not_called_live(
    sessions: Sessions, project: UUID, told: Callable[[], Turbo]
) -> None:
    with sessions.begin() as session:
        owner = session.get_one(Project, project)
        run = runs.start(session, owner, params={}, created_by="test", kind="speculator")
        runs.add_event(session, run.id, "gate", {"decision": "refuse", "reasons": ["no gain"]})
        runs.finish(session, run, "succeeded", "refused")
    assert (told().heads, told().heads_live_at) == ("refused, not tried on traffic: no gain", None)
    with sessions.begin() as session:
        digest = run_heads(session, project, "canary")
        speculators.stage_canary(session, project, digest, 0.5, Decision("rollout", "passed", {}))
        speculators.withdraw_canary(session, project, Decision("rollout", "no better", {}))
    assert (told().heads.split(": ")[1], told().heads_live_at) == ("no better", None)


class Recorder(App):
    """An app that answers nothing, and knows what it was asked."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", "key", "entities", clients=0, rate=1)
        self.asked: list[tuple[str, str | None]] = []

    def ask(self, messages: list[dict[str, str]], user: str | None = None) -> str:
        self.asked.append((str(messages), user))
        return ""


def test_no_prompt_is_probed_twice_or_the_suffix_drafter_would_know_its_answer() -> None:
    app, seen = Recorder(), cast(list[Progress], [])
    probe = Probe(app, Plan(probe=30), seen.append)
    for stage in ("start", "warm", "heads"):
        probe.run(stage)
    assert len({prompt for prompt, _ in app.asked}) == len(app.asked) == 90
    assert [user for _, user in app.asked[::30]] == ["probe-start", "probe-warm", "probe-heads"]


def test_a_plan_without_a_probe_asks_nothing() -> None:
    app = Recorder()
    Probe(app, Plan(), lambda _: None).run("start")
    assert app.asked == []


@pytest.mark.parametrize("plain", [True, False])
def test_the_picture_marks_the_stages_even_where_there_is_no_baseline(tmp_path: Path, *, plain: bool) -> None:
    rows = [
        timed(100.0 + at, drafted=not plain or at % 3 > 0, probe="start" if at < 9 else None, at=at) for at in range(60)
    ]
    served = [Served(row.finished, row.finished, None, True, True, 5.0) for row in rows]
    turbo = Turbo(rows, stages(rows), pair(rows), Pair(None, None), "not trained", rows[-1].finished)
    share, gaps = wilson(1, 2), Gaps(5.0, 1)
    report = Report(
        "entities", "promote", [], share, share, share, share, 60, 0, gaps, gaps, gaps, None, None, NOW, NOW, NOW,
        rows[30].finished, 1, 1, served, turbo,
    )  # fmt: skip
    draw(report, tmp_path / "demo.svg")
    assert "<svg" in (tmp_path / "demo.svg").read_text()
    assert len(turbo_rows(turbo)) == 4
