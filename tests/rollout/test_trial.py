"""The watch over a canary: every request counted once, decisions by evidence, safe to kill between any two steps."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError

from services.errors import NO_SLOT, Conflict
from services.settings import Settings
from services.store import engine_reports, rollout_counts, rollouts, trials
from services.store.base import make_sessions, uuid7
from services.store.engine_reports import Report
from services.store.models import EngineReport, Project, Rollout
from tests.rollout.conftest import ROOT, World
from tests.rollout.trials import (
    AT_ONCE,
    BY_ADA,
    LIVE,
    NEW,
    answer,
    begin,
    current,
    deployment,
    kinds,
    look,
    newest,
    say,
    serve,
    traffic,
)
from worker.rollout.trial import Trials


def arms(world: World, metric: str) -> tuple[tuple[int, float], tuple[int, float]]:
    """(outcomes, their weighted sum) of candidate and control."""
    with world.sessions() as session:
        found = rollout_counts.moments(session, current(world).id).get(metric)
    none = rollout_counts.Arms(rollout_counts.NONE, rollout_counts.NONE)
    canary, control = found or none
    return (canary.n, canary.y), (control.n, control.y)


def test_each_answer_is_counted_once_however_often_one_looks(world: World) -> None:
    serve(world)
    rollout = begin(world)
    for user in ("ada", "alan"):
        answer(world, rollout, "canary", user)
        answer(world, rollout, "control", user)
    for _ in range(3):
        look(world)
    assert arms(world, "errors") == ((2, 0.0), (2, 0.0))
    answer(world, rollout, "canary", "ada", ago=0.0)
    look(world)
    assert arms(world, "errors")[0] == (3, 0.0)


def test_what_lands_late_is_waited_for(world: World) -> None:
    serve(world)
    rollout = begin(world)
    answer(world, rollout, "canary", "ada", ago=3.0)
    slow = Trials(lands_within=timedelta(seconds=10))
    slow.step(world.sessions, datetime.now(UTC))
    answer(world, rollout, "canary", "alan", ago=5.0)
    assert arms(world, "errors")[0][0] == 0
    slow.step(world.sessions, datetime.now(UTC) + timedelta(seconds=70))
    assert arms(world, "errors")[0][0] == 2


@pytest.mark.parametrize(
    "other",
    [
        {"origin": "pinned"}, {"origin": "shadow"}, {"generation": 99}, {"arm": "active"},
        {"finish_reason": "interrupted"},
    ],
    ids=str,
)  # fmt: skip
def test_what_belongs_to_no_arm_counts_nowhere(world: World, other: dict[str, object]) -> None:
    serve(world)
    rollout = begin(world)
    answer(world, rollout, **{"arm": "canary", "user": "ada"} | other)  # type: ignore[arg-type]
    look(world)
    assert arms(world, "errors") == ((0, 0.0), (0, 0.0))


def test_every_guardrail_is_read_from_the_log(world: World) -> None:
    serve(world)
    rollout = begin(world)
    with world.sessions.begin() as session:
        session.execute(update(Rollout).values(reference={"latency": 300.0, "ttft": 50.0}))
    answer(world, rollout, "canary", "a", finish_reason="error")
    answer(world, rollout, "canary", "b", latency_ms=900.0, ttft_ms=80.0)
    answer(world, rollout, "canary", "c", output="I'm sorry, but I cannot help with that.")
    answer(world, rollout, "canary", "d", drafted_tokens=10, accepted_tokens=4)
    answer(world, rollout, "canary", "e", adapter_digest=LIVE)
    answer(world, rollout, "control", "f", latency_ms=900.0, speculator_digest="5" * 64, drafted_tokens=9)
    look(world)
    # The one that was passed over for what is live counts as an error, and as nothing else of the candidate's.
    assert arms(world, "errors")[0] == (5, 2.0)
    assert arms(world, "latency") == ((3, 1.0), (0, 0.0))
    assert arms(world, "ttft")[0] == (3, 1.0)
    assert arms(world, "refusals")[0] == (3, 1.0)
    assert arms(world, "acceptance") == ((1, 0.4), (0, 0.0))
    assert arms(world, "length")[1][0] == 1


def test_feedback_counts_when_it_comes_and_as_what_it_says(world: World) -> None:
    serve(world)
    rollout = begin(world, score_range=(0.0, 5.0))
    said = [{"rating": 1}, {"rating": 0}, {"rating": -1}, {"score": 4.0}, {"score": 99.0}, {"correction": "better"}]
    for number, opinion in enumerate(said):
        say(world, answer(world, rollout, "canary", f"u{number}"), **opinion)  # type: ignore[arg-type]
    answer(world, rollout, "canary", "silent")
    say(world, answer(world, rollout, "canary", "passed over", adapter_digest=LIVE), rating=-1)
    look(world)
    assert arms(world, "signal")[0] == (6, pytest.approx(1 + 0.5 + 0 + 0.8 + 1 + 0))


def test_feedback_that_comes_long_after_its_answer_counts(world: World) -> None:
    serve(world)
    rollout = begin(world)
    late = answer(world, rollout, "canary", "late", ago=25 * 60)
    answer(world, rollout, "control", "now", ago=0.0)
    look(world)
    with world.sessions.begin() as session:
        session.execute(update(Rollout).values(folded_until=datetime.now(UTC) - timedelta(seconds=60)))
    say(world, late, rating=1, ago=30.0)
    look(world)
    assert arms(world, "signal")[0] == (1, 1.0)


ELSEWHERE = {"base_digest": "another", "adapter_digest": None}
NO_ROOM = {"finish_reason": "error", "error": NO_SLOT, "ttft_ms": None}


@pytest.mark.parametrize(("canary", "control"), [(ELSEWHERE, ELSEWHERE), (NO_ROOM, {})], ids=["base", "slots"])
def test_what_the_engine_lacks_is_held_against_nobody(
    world: World, canary: dict[str, object], control: dict[str, object]
) -> None:
    serve(world)
    rollout = begin(world, share=0.5)
    for user in range(30):
        answer(world, rollout, "canary", f"a{user}", **canary)
        answer(world, rollout, "control", f"b{user}", **control)
    with world.sessions.begin() as session:
        engine_reports.put(session, "engine", 1, [Report(world.project_id, rollout.generation, (LIVE,))])
    look(world)
    assert arms(world, "errors")[0] == (0, 0.0)
    assert (current(world).stage, deployment(world).automatic_rollbacks) == ("canary", 0)
    verdict = current(world).verdict
    assert (verdict["action"], verdict["users"]) == ("wait", [30, 30]), "the split is as it should be"
    assert "not loaded in engine: if that lasts, another base model or too few adapter slots" in verdict["reason"]


@pytest.mark.parametrize(
    "failing",
    [{"finish_reason": "error", "error": "EngineGone()"}, {"adapter_digest": LIVE}],
    ids=["the engine dies of it", "the engine refuses it"],
)
def test_what_is_the_candidates_own_fault_counts(world: World, failing: dict[str, object]) -> None:
    serve(world)
    rollout = begin(world, share=0.5)
    for user in range(30):
        answer(world, rollout, "canary", f"a{user}", **failing)
        answer(world, rollout, "control", f"b{user}")
    look(world)
    assert (current(world).stage, deployment(world).automatic_rollbacks) == ("rolled_back", 1)


def test_control_is_what_was_live_when_the_trial_began(world: World) -> None:
    serve(world)
    rollout = begin(world, signal="logprob")
    answer(world, rollout, "control", "own")
    answer(world, rollout, "control", "fallen back", adapter_digest=None)
    look(world)
    assert arms(world, "errors")[1] == (2, 1.0)
    assert arms(world, "signal")[1][0] == arms(world, "length")[1][0] == 1


def test_who_waited_for_weights_to_be_loaded_tells_nothing_of_speed(world: World) -> None:
    serve(world)
    rollout = begin(world)
    with world.sessions.begin() as session:
        session.execute(update(Rollout).values(reference={"latency": 300.0, "ttft": 50.0}))

    def loaded(*digests: str, ago: float) -> None:
        with world.sessions.begin() as session:
            engine_reports.put(session, "engine", 1, [Report(world.project_id, rollout.generation, digests)])
            session.execute(update(EngineReport).values(changed_at=datetime.now(UTC) - timedelta(seconds=ago)))

    loaded(LIVE, ago=600)
    answer(world, rollout, "canary", "a", ttft_ms=5000.0, ago=20)
    look(world)
    assert (arms(world, "ttft")[0], arms(world, "errors")[0]) == ((0, 0.0), (1, 0.0))
    loaded(LIVE, NEW, ago=15)
    answer(world, rollout, "canary", "a", ttft_ms=5000.0, latency_ms=5000.0, ago=0.0)
    look(world)
    assert (arms(world, "ttft")[0], arms(world, "latency")[0]) == ((1, 1.0), (1, 1.0))
    loaded(LIVE, NEW, ago=0.1)
    answer(world, rollout, "canary", "a", ttft_ms=5000.0, ago=0.0)
    look(world)
    assert (arms(world, "ttft")[0], arms(world, "errors")[0][0]) == ((1, 1.0), 3)


def test_what_is_said_before_an_answer_is_whole_counts_with_it(world: World) -> None:
    serve(world)
    rollout = begin(world)
    interaction_id = uuid7()
    say(world, interaction_id, rating=-1, ago=30.0)
    answer(world, rollout, "control", "other", ago=10.0)
    look(world)
    answer(world, rollout, "canary", "hasty", ago=0.0, id=interaction_id)
    look(world)
    look(world)
    assert arms(world, "signal")[0] == (1, 0.0)


def test_implicit_needs_no_word_from_anybody(world: World) -> None:
    serve(world)
    rollout = begin(world, signal="implicit")
    answer(world, rollout, "canary", "content")
    answer(world, rollout, "canary", "left", finish_reason="cancelled")
    say(world, answer(world, rollout, "canary", "cross"), rating=-1)
    look(world)
    assert arms(world, "signal")[0] == (3, 1.0)


def test_checks_read_the_answers(world: World) -> None:
    with world.sessions.begin() as session:
        session.get_one(Project, world.project_id).config = {"response_schema": {"type": "object"}}
    serve(world)
    rollout = begin(world, signal="checks", pattern=r"\{.*\}")
    for user, output in (("a", '{"x": 1}'), ("b", "no"), ("c", "[1]")):
        answer(world, rollout, "canary", user, output=output)
    look(world)
    assert arms(world, "signal")[0] == (3, 1.0)


def test_one_user_weighs_no_more_than_the_most_there_is(world: World) -> None:
    serve(world)
    rollout = begin(world)
    for _ in range(rollout_counts.MOST_WEIGHT + 5):
        answer(world, rollout, "canary", "loud", finish_reason="error")
    look(world)
    assert arms(world, "errors")[0] == (rollout_counts.MOST_WEIGHT + 5, float(rollout_counts.MOST_WEIGHT))


def test_a_candidate_that_is_no_worse_goes_live_by_itself(world: World) -> None:
    serve(world)
    rollout = begin(world, harm=0.2, share=0.5)
    traffic(world, rollout, 160, (0.9, 0.9))
    look(world)
    row = deployment(world)
    assert (row.active_digest, current(world).stage) == (NEW, "promoted"), current(world).verdict
    event = newest(world)
    assert (event.kind, event.actor) == ("flip", "rollout")
    assert event.reason.startswith("no worse by 20 points or more")
    assert event.evidence["candidate_users"] == 160


def test_a_worse_candidate_is_taken_back_by_itself_and_counted(world: World) -> None:
    serve(world)
    rollout = begin(world, share=0.5)
    traffic(world, rollout, 120, (0.5, 0.95))
    look(world)
    row = deployment(world)
    assert (row.active_digest, row.canary_digest, row.automatic_rollbacks) == (LIVE, None, 1)
    assert (world.state(NEW), current(world).stage) == ("rolled_back", "rolled_back")
    assert newest(world).reason.startswith("worse than what serves")
    assert newest(world).evidence["automatic"] is True


def test_an_undecided_one_goes_on_and_says_how_long(world: World) -> None:
    serve(world)
    rollout = begin(world, share=0.5)
    traffic(world, rollout, 25, (0.9, 0.9))
    look(world)
    after = current(world)
    assert after.stage == "canary"
    assert after.verdict["action"] == "wait"
    assert after.verdict["more"] > 0
    assert after.verdict["users"] == [25, 25]
    assert after.track[-1]["requests"] == 150


def test_a_split_that_is_off_is_told_once_and_decides_nothing(world: World) -> None:
    serve(world)
    rollout = begin(world, share=0.1)
    traffic(world, rollout, 120, (0.5, 0.95))
    look(world)
    answer(world, rollout, "canary", "one more", ago=0.5)
    look(world)
    assert current(world).verdict["action"] == "hold"
    with world.sessions.begin() as session:
        # By now the split is right again; what came before is still among the counts.
        session.execute(update(Rollout).values(share=0.5))
    answer(world, rollout, "canary", "another", ago=0.2)
    look(world)
    assert not current(world).verdict["ratio"]["off"]
    assert current(world).verdict["action"] == "hold"
    assert kinds(world).count("canary_held") == 1
    assert deployment(world).canary_digest == NEW


def test_promotion_waits_for_every_engine_that_is_there(world: World) -> None:
    serve(world)
    rollout = begin(world, harm=0.2, share=0.5)
    traffic(world, rollout, 160, (0.9, 0.9))
    with world.sessions.begin() as session:
        behind = [Report(world.project_id, rollout.generation - 1, ())]
        engine_reports.put(session, "slow", 1, behind)
        engine_reports.put(session, "gone", 1, behind)
        long_ago = datetime.now(UTC) - timedelta(minutes=5)
        session.execute(update(EngineReport).where(EngineReport.engine == "gone").values(seen_at=long_ago))
    look(world)
    assert "waits for slow to load" in current(world).verdict["reason"]
    assert deployment(world).active_digest == LIVE
    with world.sessions.begin() as session:
        engine_reports.put(session, "slow", 1, [Report(world.project_id, rollout.generation, (LIVE, NEW))])
    look(world)
    assert deployment(world).active_digest == NEW


def test_a_look_that_was_overtaken_counts_nothing(world: World) -> None:
    serve(world)
    rollout = begin(world)
    answer(world, rollout, "canary", "ada")
    with world.sessions() as first:
        mine = first.get_one(Rollout, rollout.id)
        span = rollout_counts.next_span(first, mine, datetime.now(UTC), lands_within=AT_ONCE, quiet=AT_ONCE)
        look(world)
        with pytest.raises(Conflict, match="another look"):
            rollout_counts.fold(first, mine, span)
        first.rollback()
    assert arms(world, "errors")[0][0] == 1


def test_who_counts_waits_for_who_ends_it_before_touching_a_count(world: World, database_url: str) -> None:
    serve(world)
    rollout = begin(world)
    answer(world, rollout, "canary", "ada")
    look(world)
    answer(world, rollout, "canary", "ada", ago=0.0)
    world.sessions = make_sessions(database_url, pool_size=3)
    with world.sessions.begin() as ending, world.sessions() as counting:
        rollouts.end(ending, world.project_id, "stopped", BY_ADA)
        counting.execute(text("SET LOCAL lock_timeout = '50ms'"))
        mine = counting.get_one(Rollout, rollout.id)
        span = rollout_counts.next_span(counting, mine, datetime.now(UTC), lands_within=AT_ONCE, quiet=AT_ONCE)
        with pytest.raises(OperationalError, match='relation "rollout"'):
            rollout_counts.fold(counting, mine, span)
    world.sessions.kw["bind"].dispose()


@pytest.mark.parametrize("failpoint", ["canary.counted", "canary.deciding", "canary.decided"])
@pytest.mark.parametrize("satisfied", [(0.5, 0.95), (0.95, 0.95)], ids=["worse", "no worse"])
def test_killed_anywhere_the_next_look_ends_with_one_live_digest_and_every_request_counted_once(
    world: World, settings: Settings, failpoint: str, satisfied: tuple[float, float]
) -> None:
    serve(world)
    rollout = begin(world, harm=0.2, share=0.5)
    traffic(world, rollout, 160, satisfied)
    died = subprocess.run(
        [sys.executable, "-m", "tests.rollout.watching"],
        cwd=ROOT, env={**os.environ, "WHET_FAILPOINT": failpoint}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert died.returncode == 137, died.stderr.decode()
    decided = current(world).stage != "canary"
    assert decided == (failpoint == "canary.decided")
    if not decided:
        assert arms(world, "errors")[0][0] in (0, 480)
    look(world)
    look(world)
    wanted = LIVE if satisfied[0] < satisfied[1] else NEW
    assert deployment(world).active_digest == wanted
    with world.sessions() as session:
        assert trials.open_of(session, world.project_id) is None
        users = session.scalar(select(Rollout.verdict["requests"][0].as_integer()))
    assert users == 480
    assert kinds(world).count("flip") + kinds(world).count("canary_rolled_back") == 2
