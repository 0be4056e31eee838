"""What a gate will have to judge by, told before a run: corrections two people agree on, and what holds up others."""

import pytest

from services.store import held_out, people, revisions
from services.store.held_out import HeldOut, Waits, cause, warning
from tests.curation.world import World
from worker.curation.build import build_revision


def queued(world: World) -> HeldOut:
    with world.sessions() as session:
        return held_out.of_queue(session, world.project(session))


def built(world: World) -> HeldOut:
    """What the gate would count in a revision built now."""
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        members = revisions.members(session, revision.id, "held_out")
        return held_out.of_examples(session, world.project(session), [one.example for one in members])


def alone(world: World, count: int) -> None:
    """Corrections of one person: what is trained on is complete, what is held out is not."""
    for index in range(count):
        world.corrected(f"train number {index}", "bad", f"good {index}")
        world.judge(world.item(world.log(f"held out {index}", "bad"), "held_out"), "correct", f"good {index}")


def test_one_person_alone_makes_nothing_to_judge_by_and_is_told_why(world: World) -> None:
    alone(world, 12)

    assert queued(world) == built(world) == HeldOut(0, 30, Waits(second=12))
    assert queued(world).short
    assert warning(queued(world)) == (
        "the gate needs held-out corrections of 30 groups and has 0, so it would refuse whatever is trained; 12 "
        "held-out answers wait for a second reviewer, as two people have to agree on each"
    )


def test_what_two_people_agree_on_is_counted_by_group_as_the_gate_counts_it(world: World) -> None:
    world.configure(min_held_out=4)
    for index in range(5):
        world.corrected(f"wrong number {index}", "bad", f"good {index}", "held_out", group=f"session {index % 3}")
        world.accepted(f"right number {index}", "fine", "held_out")
        world.corrected(f"train number {index}", "bad", f"good {index}")
    rejected = world.item(world.log("rejected by both", "bad"), "held_out")
    for reviewer in (0, 1):
        world.judge(rejected, "reject", reviewer=reviewer)

    assert queued(world) == built(world) == HeldOut(3, 4, Waits())
    world.corrected("one more of the others", "bad", "good", "held_out")
    assert queued(world) == built(world) == HeldOut(4, 4, Waits())
    assert not queued(world).short


def test_what_reviewers_disagree_on_waits_for_a_lead_whose_word_counts(world: World) -> None:
    world.corrected("something to build from", "bad", "good")
    items = [world.item(world.log(f"disputed {index}", "bad"), "held_out") for index in range(2)]
    for item in items:
        world.judge(item, "correct", "good")
        world.judge(item, "accept", reviewer=1)
    assert queued(world) == built(world) == HeldOut(0, 30, Waits(lead=2))

    with world.sessions.begin() as session:
        lead = people.create_user(session, email="lead@example.org", name="Lead")
        people.grant(session, lead.id, "lead", world.project_id)
        world.reviewers.append(lead.id)
    world.judge(items[0], "correct", "better", reviewer=2, comment="the house says so")
    world.judge(items[1], "accept", reviewer=2, comment="nothing is wrong")

    assert queued(world) == built(world) == HeldOut(1, 30, Waits())


def test_an_undone_judgement_no_longer_counts(world: World) -> None:
    world.corrected("something to build from", "bad", "good")
    item = world.item(world.log("wrong", "bad"), "held_out")
    world.judge(item, "correct", "good")
    mine = world.judge(item, "correct", "good", reviewer=1)
    assert queued(world).groups == 1

    world.undo(mine, reviewer=1)

    assert queued(world) == built(world) == HeldOut(0, 30, Waits(second=1))


@pytest.mark.parametrize(
    ("waits", "told"),
    [
        (Waits(), None),
        (Waits(second=1), "1 held-out answer waits for a second reviewer, as two people have to agree on each"),
        (Waits(lead=1200), "1,200 held-out answers wait for a lead to decide"),
    ],
)
def test_the_cause_is_named_where_it_can_be_known(waits: Waits, told: str | None) -> None:
    assert cause(waits) == told


def test_where_nothing_waits_there_is_more_to_review() -> None:
    assert "review more answers" in warning(HeldOut(2, 30, Waits()))
