"""The sampler against a real log: closed windows, fixed strata, nothing moves afterwards."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from services.settings import Settings
from services.store import jobs
from services.store.jobs import JobFailed
from services.store.models import ReviewItem
from services.store.quality import estimate_quality
from tests.curation.world import World
from worker.curation.sample import realised, sample, sample_job

HOUR = timedelta(hours=1)


def this_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0)


def run_sampler(world: World, now: datetime) -> int:
    with world.sessions.begin() as session:
        return sample(session, world.project_id, now=now)


def items(world: World) -> list[ReviewItem]:
    with world.sessions() as session:
        return list(session.scalars(select(ReviewItem).order_by(ReviewItem.priority)))


def test_an_open_window_is_left_alone_until_it_and_its_grace_have_passed(world: World) -> None:
    start = this_hour()
    world.log("hello", at=start + timedelta(minutes=5))

    assert run_sampler(world, start + HOUR) == 0
    assert run_sampler(world, start + HOUR + timedelta(seconds=59)) == 0
    assert run_sampler(world, start + HOUR + timedelta(seconds=61)) == 1


def test_running_again_adds_nothing_and_moves_nothing(world: World) -> None:
    start = this_hour()
    for index in range(30):
        world.log(f"prompt {index}", at=start + timedelta(seconds=index))
    assert run_sampler(world, start + 2 * HOUR) == 30
    before = [(item.interaction_id, item.strategy, item.stratum_size, item.priority) for item in items(world)]

    late = world.log("landed late", at=start + timedelta(minutes=3))
    for interaction_id in world.interactions[:10]:
        world.dislike(interaction_id)

    assert run_sampler(world, start + 3 * HOUR) == 0
    after = [(item.interaction_id, item.strategy, item.stratum_size, item.priority) for item in items(world)]
    assert after == before
    assert late not in {item.interaction_id for item in items(world)}


def test_each_interaction_is_in_one_stratum_and_complaints_come_before_the_audit(world: World) -> None:
    world.configure(review_budget=10)
    start = this_hour()
    for index in range(40):
        world.log(f"prompt {index}", at=start + timedelta(seconds=index))
    for interaction_id in world.interactions[:20]:
        world.dislike(interaction_id)
        world.dislike(interaction_id)

    assert run_sampler(world, start + 2 * HOUR) == 10

    made = items(world)
    disliked = set(world.interactions[:20])
    assert all((item.strategy == "negative_feedback") == (item.interaction_id in disliked) for item in made)
    assert [item.strategy for item in made].count("uniform") == 3
    assert {item.stratum_size for item in made} == {20}


def test_windows_that_follow_each_other_are_sampled_each_for_itself(world: World) -> None:
    start = this_hour()
    world.log("first", at=start)
    world.log("second", at=start + 3 * HOUR)

    assert run_sampler(world, start + 2 * HOUR) == 1
    assert run_sampler(world, start + 5 * HOUR) == 1

    made = items(world)
    assert len({item.window for item in made}) == 2
    assert all(item.stratum_size == 1 and item.priority == 0 for item in made)


def test_only_live_answers_that_ended_by_themselves_are_reviewed(world: World) -> None:
    start = this_hour()
    good = world.log("good", at=start, finish_reason="length")
    for fields in ({"origin": "shadow"}, {"origin": "evaluation"}, {"finish_reason": "error"}):
        world.log("other", at=start, **fields)

    assert run_sampler(world, start + 2 * HOUR) == 1
    assert [item.interaction_id for item in items(world)] == [good]


def test_the_split_follows_the_group_and_held_out_items_want_two_reviewers(world: World) -> None:
    world.configure(held_out_share=0.5)
    start = this_hour()
    for index in range(40):
        world.log(f"prompt {index}", at=start + timedelta(seconds=index), group=f"session {index % 8}")

    run_sampler(world, start + 2 * HOUR)

    made = items(world)
    sides = {group: {item.split for item in made if item.group_key == group} for group in {i.group_key for i in made}}
    assert all(len(side) == 1 for side in sides.values())
    assert {item.split for item in made} == {"train", "held_out"}
    assert all(item.overlap_target == (2 if item.split == "held_out" else 1) for item in made)


def test_probability_is_what_was_labelled_and_the_estimate_waits_for_every_stratum(world: World) -> None:
    world.configure(held_out_share=0)
    start = this_hour()
    for index in range(20):
        world.log(f"prompt {index}", at=start + timedelta(seconds=index))
    for interaction_id in world.interactions[:4]:
        world.dislike(interaction_id)
    run_sampler(world, start + 2 * HOUR)
    made = items(world)
    audit = [item for item in made if item.strategy == "uniform"]
    flagged = [item for item in made if item.strategy == "negative_feedback"]

    for item in audit[:8]:
        world.judge(item.id, "accept")
    with world.sessions.begin() as session:
        realised(session, world.project_id)
        assert estimate_quality(session, world.project_id) is None
    assert {item.probability for item in items(world) if item.strategy == "uniform"} == {0.5}
    assert {item.probability for item in items(world) if item.strategy == "negative_feedback"} == {0.0}

    for item in flagged[:2]:
        world.judge(item.id, "reject")
    with world.sessions() as session:
        found = estimate_quality(session, world.project_id)
    assert found is not None
    assert found.rate == pytest.approx(16 / 20)
    assert found.low < 16 / 20 < found.high
    assert (found.labelled, found.population) == (10, 20)

    world.log("in a window nobody has come to", at=start + 3 * HOUR)
    run_sampler(world, start + 5 * HOUR)
    with world.sessions() as session:
        assert estimate_quality(session, world.project_id) == found


def test_the_job_fills_the_queue_and_refuses_a_senseless_configuration(world: World, settings: Settings) -> None:
    world.configure(window_seconds=1, window_grace_seconds=0)
    world.log("hello", at=datetime.now(UTC) - timedelta(seconds=3))
    with world.sessions.begin() as session:
        job = jobs.enqueue(session, "review.sample", {"project_id": str(world.project_id)})
    lease = jobs.claim(world.sessions, job.id, "test")
    assert lease is not None

    with lease:
        sample_job(lease, settings)
        assert len(items(world)) == 1
        world.configure(window_seconds=0)
        with pytest.raises(JobFailed, match="window_seconds"):
            sample_job(lease, settings)


def test_what_people_chose_before_the_window_closed_is_a_stratum_of_it_and_in_no_other(world: World) -> None:
    world.configure(held_out_share=0)
    start = this_hour()
    for index in range(20):
        world.log(f"prompt {index}", at=start + timedelta(seconds=index))
    picked = world.interactions[:4]
    made_by_hand = [world.item(one, strategy="chosen", window="", stratum_size=1) for one in picked]
    withdrawn = world.item(world.interactions[4], strategy="chosen", window="", stratum_size=1, state="withdrawn")

    assert run_sampler(world, start + 2 * HOUR) == 15  # of the sixteen left one is withdrawn
    assert run_sampler(world, start + 3 * HOUR) == 0

    by_id = {item.id: item for item in items(world)}
    drawn = [item for item in by_id.values() if item.strategy == "uniform"]
    assert {item.stratum_size for item in drawn} == {16}
    assert {(by_id[one].stratum_size, by_id[one].window) for one in made_by_hand} == {(4, drawn[0].window)}
    assert by_id[withdrawn].window == ""

    for item in drawn[:8]:
        world.judge(item.id, "accept")
    with world.sessions() as session:
        assert estimate_quality(session, world.project_id) is None  # nobody has looked at what was picked
    for one in made_by_hand[:2]:
        world.judge(one, "reject")
    with world.sessions.begin() as session:
        realised(session, world.project_id)
        found = estimate_quality(session, world.project_id)
    assert found is not None
    assert (found.rate, found.population) == (pytest.approx(16 / 20), 20)
    assert {item.probability for item in items(world) if item.strategy == "chosen" and item.window} == {0.5}


def test_what_people_choose_after_the_window_has_closed_moves_nothing(world: World) -> None:
    world.configure(held_out_share=0, review_budget=10)
    start = this_hour()
    for index in range(20):
        world.log(f"prompt {index}", at=start + timedelta(seconds=index))
    run_sampler(world, start + 2 * HOUR)
    for item in items(world):
        world.judge(item.id, "accept")
    with world.sessions() as session:
        before = estimate_quality(session, world.project_id)
    left = set(world.interactions) - {item.interaction_id for item in items(world)}
    late = world.item(left.pop(), strategy="chosen", window="", stratum_size=1)
    world.judge(late, "reject")

    assert run_sampler(world, start + 3 * HOUR) == 0
    with world.sessions() as session:
        assert estimate_quality(session, world.project_id) == before
