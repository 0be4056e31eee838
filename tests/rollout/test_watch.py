"""The dispatcher's look at the log, with rows as the shipper lands them: the heads' whole life by state."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.exc import IntegrityError
from structlog.testing import capture_logs

from services.store import speculation_log, speculators
from services.store.models import InteractionBody, Run
from services.store.speculation import Heads
from tests.rollout.conftest import World
from tests.rollout.drafters import (
    BECAUSE,
    EVEN,
    Traffic,
    configure,
    counts,
    drafting,
    go_live,
    heads,
    history,
    interaction,
    land,
    serve,
    set_back,
)
from worker.rollout.watch import Watch

A = "a" * 64
H1, H2 = "1" * 64, "2" * 64
NOW = datetime.now(UTC)


def stage(world: World, digest: str, *, ago: timedelta = timedelta(hours=2)) -> Traffic:
    """A canary since then, and the traffic that comes to it."""
    with world.sessions.begin() as session:
        speculators.stage_canary(session, world.project_id, digest, 0.25, BECAUSE)
    set_back(world, "speculator_canary", NOW - ago)
    return Traffic(world, NOW - ago + timedelta(seconds=10))


def live(world: World, digest: str, *, ago: timedelta = timedelta(hours=4)) -> Traffic:
    go_live(world, digest)
    set_back(world, "speculator_live", NOW - ago)
    return Traffic(world, NOW - ago + timedelta(seconds=10))


def look(world: World, watch: Watch | None = None, *, at: datetime = NOW) -> list[Any]:
    """One look; the alarms it raised."""
    with capture_logs() as lines:
        (watch or Watch()).step(world.sessions, at)
    return [line for line in lines if line.get("alarm")]


def newest(world: World) -> tuple[str, str | None, str | None]:
    event = history(world)[-1]
    return (event.kind, event.from_digest, event.to_digest)


def test_a_better_canary_goes_live_with_its_figures(world: World) -> None:
    traffic = stage(world, heads(world, H1))
    traffic.land(100, {**EVEN, "canary": (2.8, 130.0)})
    look(world)
    assert drafting(world) == Heads(None, H1, 0.25), "too few requests yet"

    traffic.land(400, {**EVEN, "canary": (2.8, 130.0)})
    assert look(world) == []

    assert (drafting(world), world.state(H1)) == (Heads(H1), "live")
    assert newest(world) == ("speculator_live", None, H1)
    event = history(world)[-1]
    assert event.actor == "rollout"
    assert event.evidence["requests"][0] in (60, 120)
    assert event.evidence["length_ratio"][1] > 1
    assert event.evidence["tokens_per_step"] == pytest.approx([2.8, 2.0], abs=0.2)


def test_a_canary_below_the_live_heads_is_rolled_back_and_they_go_on(world: World) -> None:
    live(world, heads(world, H1))
    stage(world, heads(world, H2)).land(500, {**EVEN, "live": (2.8, 130.0), "canary": (2.0, 100.0)})

    look(world)

    assert (drafting(world), world.state(H1), world.state(H2)) == (Heads(H1), "live", "rolled_back")
    assert newest(world) == ("speculator_rolled_back", H2, H1)


def test_a_canary_without_traffic_ends_after_its_hours(world: World) -> None:
    stage(world, heads(world, H1), ago=timedelta(hours=23))
    watch = Watch()
    look(world, watch)
    assert drafting(world).canary == H1
    look(world, watch, at=NOW + timedelta(hours=2))
    assert (drafting(world), world.state(H1)) == (Heads(), "retired")
    assert "undecided after 24 hours" in history(world)[-1].reason


def test_where_nothing_is_automatic_a_person_decides(world: World) -> None:
    configure(world, automatic=False)
    stage(world, heads(world, H1)).land(500, {**EVEN, "canary": (2.8, 130.0)})
    look(world)
    assert drafting(world).canary == H1


def test_what_other_adapters_or_no_live_request_answered_is_no_evidence(world: World) -> None:
    traffic = stage(world, heads(world, H1))
    better = {**EVEN, "canary": (2.8, 130.0)}
    traffic.land(400, better, adapter_digest=A)
    traffic.land(400, better, origin="evaluation")
    traffic.land(400, better, finish_reason="cancelled")
    look(world)
    assert drafting(world).canary == H1


def test_what_drafted_with_other_heads_than_its_arms_is_no_evidence(world: World) -> None:
    stage(world, heads(world, H1)).land(400, {**EVEN, "canary": (2.8, 130.0)}, speculator_digest=H2)
    look(world)
    assert drafting(world).canary == H1


def test_requests_of_a_pinned_artefact_belong_to_no_arm(world: World) -> None:
    asked: dict[str, list[UUID]] = {"support": [], f"support@{A}": []}
    for minute, model in enumerate([*asked, *asked]):
        row = interaction(world.project_id, NOW - timedelta(minutes=minute))
        body = InteractionBody(
            id=row.id, messages=[], parameters={"model": model}, output="", prompt_token_ids=[], token_ids=[],
            token_logprobs=[], prompt_hash="", template_hash="", tokenizer_hash="", spool_version=1,
        )  # fmt: skip
        asked[model].append(row.id)
        land(world.sessions, [row, body])

    with world.sessions() as session:
        found = speculation_log.requests(session, world.project_id, None, since=NOW - timedelta(hours=1), limit=10)

    assert {one.id for one in found} == set(asked["support"])


def test_live_heads_that_fall_below_the_control_arm_are_rolled_back_to_the_last_good_ones(world: World) -> None:
    live(world, heads(world, H1))
    traffic = live(world, heads(world, H2))
    traffic.land(600, {**EVEN, "live": (2.6, 120.0)})
    watch = Watch()
    assert look(world, watch) == []
    assert drafting(world).live == H2

    traffic.land(1400, {**EVEN, "live": (1.4, 80.0)})
    alarms = look(world, watch)

    assert (drafting(world), world.state(H2)) == (Heads(H1), "rolled_back")
    assert newest(world) == ("speculator_rolled_back", H2, H1)
    assert [alarm["now_drafts"] for alarm in alarms] == [H1]


def test_just_promoted_heads_are_measured_against_the_incumbent_of_their_trial(world: World) -> None:
    configure(world, control_share=0)
    traffic = stage(world, heads(world, H1))
    traffic.land(500, {**EVEN, "canary": (2.8, 130.0)})
    look(world)
    set_back(world, "speculator_live", traffic.at)
    assert drafting(world).live == H1
    traffic.at += timedelta(seconds=10)

    traffic.land(300, {**EVEN, "live": (1.3, 90.0)})
    look(world)

    assert drafting(world) == Heads()
    assert history(world)[-1].reason == "fewer tokens accepted a step than before"


def test_dead_acceptance_raises_the_alarm_once_and_takes_the_heads_back(world: World) -> None:
    traffic = live(world, heads(world, H1))
    traffic.land(30, EVEN, accepted=0.0)
    watch = Watch()

    alarms = look(world, watch)

    assert [alarm["event"] for alarm in alarms] == ["acceptance is dead", "live heads rolled back"]
    assert (drafting(world), world.state(H1)) == (Heads(), "rolled_back")
    assert [event.kind for event in history(world)] == ["speculator_live", "speculator_alarm", "speculator_rolled_back"]
    assert look(world, watch) == []


def test_a_dead_canary_raises_the_alarm_too(world: World) -> None:
    stage(world, heads(world, H1)).land(120, EVEN, accepted=0.0)
    assert len(look(world)) == 1
    assert (drafting(world), world.state(H1)) == (Heads(), "rolled_back")


def test_where_nothing_is_automatic_the_alarm_comes_once_and_the_heads_stay(world: World) -> None:
    configure(world, automatic=False)
    traffic = live(world, heads(world, H1))
    watch = Watch()
    for expected in (1, 0):
        traffic.land(30, EVEN, accepted=0.0)
        assert len(look(world, watch)) == expected
    assert drafting(world).live == H1


def test_a_dead_suffix_drafter_raises_the_alarm_and_changes_nothing(world: World) -> None:
    rows = [
        interaction(
            world.project_id, NOW - timedelta(minutes=number), speculation={"steps": 50, "suffix": counts(20, 0)}
        )
        for number in range(60)
    ]
    land(world.sessions, rows)
    watch = Watch()
    assert [alarm["drafter"] for alarm in look(world, watch)] == ["the suffix drafter"]
    land(world.sessions, [interaction(world.project_id, NOW)])
    assert look(world, watch) == []
    assert newest(world) == ("speculator_alarm", None, None)


def test_drift_is_told_until_the_next_training_and_then_measured_anew(world: World) -> None:
    traffic = live(world, heads(world, H1))
    watch = Watch()
    traffic.land(900, EVEN)
    look(world, watch)
    assert watch.drifted == set()
    traffic.land(600, EVEN, accepted=0.3)
    look(world, watch)
    assert watch.drifted == {world.project_id}

    with world.sessions.begin() as session:
        session.add(
            Run(project_id=world.project_id, kind="speculator", params={}, created_by="test", created_at=traffic.at)
        )
    look(world, watch)
    assert watch.drifted == set(), "also where nothing was asked since"
    traffic.land(600, EVEN, accepted=0.3)
    look(world, watch)
    assert watch.drifted == set()


def test_what_has_not_changed_is_not_read_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    live(world, heads(world, H1)).land(50, EVEN)
    watch = Watch()
    look(world, watch)
    monkeypatch.setattr("services.store.speculation_log.requests", lambda *_, **__: pytest.fail("read again"))
    look(world, watch)


def test_a_new_adapter_ends_the_trial_before_its_figures_can(world: World) -> None:
    stage(world, heads(world, H1)).land(500, {**EVEN, "canary": (2.8, 130.0)})
    serve(world, A)
    look(world)
    assert (drafting(world), world.state(H1)) == (Heads(), "retired")


def test_a_project_that_switched_speculation_off_is_left_alone(world: World) -> None:
    stage(world, heads(world, H1)).land(500, {**EVEN, "canary": (2.8, 130.0)})
    configure(world, enabled=False)
    look(world)
    assert drafting(world).canary == H1


def test_runs_of_both_kinds_may_be_unfinished_at_once_but_two_of_one_may_not(world: World) -> None:
    for kind in ("sft", "speculator"):
        with world.sessions.begin() as session:
            session.add(Run(project_id=world.project_id, kind=kind, params={}, created_by="test"))
    for kind in ("dpo", "speculator"):
        with pytest.raises(IntegrityError, match="uq_run_unfinished"), world.sessions.begin() as session:
            session.add(Run(project_id=world.project_id, kind=kind, params={}, created_by="test"))
