"""Revisions: who must agree, what becomes of each verdict, and that the same judgements give the same digest."""

from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from services.errors import Unprocessable
from services.settings import Settings
from services.store import jobs, revision_diff, revisions, runs
from services.store.examples import digest_of
from services.store.jobs import JobCancelled, JobFailed, Lease, LostLease
from services.store.models import Example, InteractionBody, Job, Revision, Run
from tests.curation.world import World
from worker.curation.build import build_job, build_revision


def build(world: World) -> Revision:
    with world.sessions.begin() as session:
        return build_revision(session, world.project_id, "golden")


def examples(world: World, revision: Revision, split: str | None = None) -> list[Example]:
    with world.sessions() as session:
        return [member.example for member in revisions.members(session, revision.id, split)]


def test_a_correction_becomes_a_pair_and_an_accepted_answer_a_completion(world: World) -> None:
    world.configure(accepted_share=0.5)
    world.corrected("two plus two", "five", "four\n")
    world.accepted("the capital of France", "Paris")

    revision = build(world)

    by_source = {example.source: example for example in examples(world, revision)}
    corrected, accepted = by_source["corrected"], by_source["accepted"]
    assert (corrected.kind, corrected.completion, corrected.rejected) == ("preference", "four", "five")
    assert (accepted.kind, accepted.completion, accepted.rejected) == ("completion", "Paris", None)
    assert (corrected.slice, accepted.slice) == ("target", "accepted")
    assert corrected.reviewers == [str(world.reviewers[0])]
    assert corrected.messages == [{"role": "user", "content": "two plus two"}]
    assert (revision.train_count, revision.held_out_count) == (2, 0)


def test_the_same_judgements_give_the_same_revision_and_the_manifest_its_digest(world: World) -> None:
    for index in range(5):
        world.corrected(f"question {index}", "wrong", f"right {index}")

    first = build(world)
    again = build(world)

    assert again.id == first.id
    with world.sessions() as session:
        assert digest_of(revisions.manifest(session, first.id)) == first.digest


def test_a_new_judgement_makes_a_child_and_leaves_the_parent_as_it_was(world: World) -> None:
    world.corrected("first", "wrong", "right")
    first = build(world)
    world.corrected("second", "wrong", "right")

    second = build(world)

    assert second.digest != first.digest
    assert second.parent_digest == first.digest
    with world.sessions() as session:
        assert digest_of(revisions.manifest(session, first.id)) == first.digest
        assert revision_diff.sizes(session, first, second) == (1, 0, 1)
        assert revisions.counts(session, second.id) == {"train": {"corrected": 2}, "held_out": {}}


def test_held_out_rows_need_two_people_who_say_the_same(world: World) -> None:
    agreed = world.corrected("agreed", "wrong", "right", "held_out")
    alone = world.item(world.log("alone"), "held_out")
    world.judge(alone, "correct", "right")
    quarrel = world.item(world.log("quarrel"), "held_out")
    world.judge(quarrel, "correct", "right", 0)
    world.judge(quarrel, "correct", "left", 1)
    verdicts = world.item(world.log("verdicts"), "held_out")
    world.judge(verdicts, "accept", reviewer=0)
    world.judge(verdicts, "correct", "right", 1)

    revision = build(world)

    assert agreed
    rows = examples(world, revision, "held_out")
    assert [row.messages[0]["content"] for row in rows] == ["agreed"]
    assert len(rows[0].reviewers) == 2
    assert revision.report["left_out"] == {"needs another reviewer": 1, "reviewers disagree": 2}


def test_an_undone_judgement_is_as_if_never_said(world: World) -> None:
    world.corrected("stays", "wrong", "right")
    item = world.item(world.log("goes", "wrong"))
    annotation = world.judge(item, "correct", "mistaken")
    world.undo(annotation)

    assert [row.messages[0]["content"] for row in examples(world, build(world))] == ["stays"]

    world.judge(item, "correct", "better")
    assert {row.completion for row in examples(world, build(world))} == {"right", "better"}


def test_cut_off_answers_and_plain_completions_are_left_out_and_counted(world: World) -> None:
    world.corrected("kept", "wrong", "right")
    world.accepted("cut", "and then", finish_reason="length")
    world.corrected("plain", "wrong", "right", endpoint="/v1/completions")

    revision = build(world)

    assert revision.report["left_out"] == {"accepted although cut off": 1, "not a chat": 1}
    with world.sessions() as session:
        assert revisions.left_out(session, revision.id, "not a chat") == [world.interactions[2]]


def test_accepted_answers_are_capped_in_training_but_not_in_the_held_out_part(world: World) -> None:
    for index in range(7):
        world.corrected(f"corrected {index}", "wrong", f"right {index}")
    for index in range(9):
        world.accepted(f"accepted {index}", f"fine {index}")
        world.accepted(f"held {index}", f"fine {index}", "held_out")

    revision = build(world)

    with world.sessions() as session:
        table = revisions.counts(session, revision.id)
    assert table == {"train": {"corrected": 7, "accepted": 3}, "held_out": {"accepted": 9}}
    assert revision.report["left_out"] == {"accepted beyond their share": 6}


def test_a_training_prompt_that_repeats_a_held_out_one_is_dropped_from_training(world: World) -> None:
    words = " ".join(f"word{index}" for index in range(150))
    world.corrected("the same prompt", "wrong", "right", "held_out", group="a")
    world.corrected("the same prompt", "wrong", "right", group="b")
    world.corrected(words, "wrong", "right", "held_out")
    world.corrected(f"{words} more", "wrong", "right")
    world.corrected("the person is Ada Alberg and she lives in Ashbridge", "wrong", "right", "held_out")
    world.corrected("the person is Zoe Zansky and she lives in Ashbridge", "wrong", "right")

    revision = build(world)

    assert (revision.train_count, revision.held_out_count) == (1, 3)
    assert revision.report["left_out"] == {"nearly repeats a held-out prompt": 2}


def test_the_same_prompt_and_answer_count_once(world: World) -> None:
    for group in "abc":
        world.corrected("again", "wrong", "right", group=group)

    revision = build(world)

    assert revision.train_count == 1
    assert revision.report["left_out"] == {"repeats another example": 2}


def test_a_rebuild_after_the_log_has_passed_its_retention_keeps_the_digest(world: World) -> None:
    world.corrected("first", "wrong", "right")
    before = build(world)
    with world.sessions.begin() as session:
        session.execute(delete(InteractionBody))

    assert build(world).digest == before.digest


def test_an_example_keeps_the_tools_of_its_request_when_the_log_is_gone(world: World) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    world.corrected("with tools", "wrong", "right", parameters={"tools": tools, "tool_choice": "auto"})
    world.corrected("without", "wrong", "right", parameters={"temperature": 0})
    before = build(world)
    with world.sessions.begin() as session:
        session.execute(delete(InteractionBody))

    assert build(world).digest == before.digest
    assert sorted(str(one.asked) for one in examples(world, before)) == ["None", str({"tools": tools})]
    with world.sessions() as session:
        assert session.scalar(select(func.count()).where(Example.asked.is_(None))) == 1, "SQL's NULL, not JSON's"
        assert not revisions.rebuild(session, before.id).changed
        session.execute(update(Example).values(asked={"tools": []}))
        assert len(revisions.rebuild(session, before.id).changed) == 2


def test_looks_are_inherited_while_most_of_the_held_out_part_is_the_parents(world: World) -> None:
    for index in range(4):
        world.corrected(f"held {index}", "wrong", "right", "held_out")
    first = build(world)
    with world.sessions.begin() as session:
        session.get_one(Revision, first.id).looks = 3

    world.corrected("one more", "wrong", "right", "held_out")
    second = build(world)
    for index in range(20):
        world.corrected(f"fresh {index}", "wrong", "right", "held_out")

    assert second.looks == 3
    assert build(world).looks == 0


def claim(world: World, run: Run) -> Lease:
    lease = jobs.claim(world.sessions, run.job_id, "test") if run.job_id else None
    assert lease is not None
    return lease


def test_a_runs_build_hands_over_to_training_once(world: World, settings: Settings) -> None:
    world.corrected("first", "wrong", "right")
    run = start(world)

    with claim(world, run) as lease:
        build_job(lease, settings)
        with pytest.raises(LostLease):
            build_job(lease, settings)

    with world.sessions() as session:
        run = session.get_one(Run, run.id)
        [built, job] = session.scalars(select(Job).order_by(Job.id))
        assert run.revision_id is not None
        assert (built.state, job.id) == ("succeeded", run.job_id)
        assert (job.kind, job.payload, job.state) == ("train", {"run_id": str(run.id)}, "queued")
        assert (built.queue, job.queue) == ("cpu", "train"), "nothing else waits for a training"
        assert run.phase == "building the revision"


def start(world: World) -> Run:
    with world.sessions.begin() as session:
        return runs.start(session, world.project(session), params={"epochs": 1}, created_by="ada")


@pytest.mark.parametrize("over", [True, False])
def test_a_build_whose_run_has_its_revision_or_is_over_does_nothing(
    world: World, settings: Settings, over: bool
) -> None:
    world.corrected("first", "wrong", "right")
    run = start(world)
    with claim(world, run) as lease:
        revision = build(world)
        with world.sessions.begin() as session:
            known = session.get_one(Run, run.id)
            known.state, known.revision_id = ("failed", None) if over else ("running", revision.id)
        build_job(lease, settings)

    with world.sessions() as session:
        assert session.get_one(Run, run.id).state == ("failed" if over else "running")
        assert session.scalars(select(Job.kind)).all() == ["dataset.build"]


def test_a_run_is_cancelled_while_its_revision_is_built(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.corrected("first", "wrong", "right")
    run = start(world)

    def cancelled_meanwhile(session: Session, project_id: UUID, dataset: str) -> Revision:
        with world.sessions.begin() as other:
            other.execute(text("SET LOCAL lock_timeout = '5s'"))
            assert runs.request_cancel(other, run.id).phase == "building the revision"
        return build_revision(session, project_id, dataset)

    monkeypatch.setattr("worker.curation.build.build_revision", cancelled_meanwhile)
    with claim(world, run) as lease:
        with pytest.raises(JobCancelled):
            build_job(lease, settings)
        lease.cancel()

    with world.sessions.begin() as session:
        assert [ended.state for ended in runs.settle(session)] == ["cancelled"]
        assert session.scalars(select(Revision)).all() == []
        assert session.scalars(select(Job.kind)).all() == ["dataset.build"]


def test_a_cancel_that_waits_for_a_hand_over_reaches_the_next_job(world: World) -> None:
    run = start(world)

    def cancel() -> None:
        with world.sessions.begin() as session:
            runs.request_cancel(session, run.id)

    with claim(world, run) as lease, ThreadPoolExecutor(1) as pool:
        with lease.transaction() as session:
            runs.hand_over(session, runs.get(session, run.id), "train", {"run_id": str(run.id)})
            lease.succeed(session)
            asked = pool.submit(cancel)
            while not session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
                assert not asked.done()
        asked.result()

    with world.sessions() as session:
        assert session.get_one(Run, run.id).state == "cancelled"
        assert dict(session.execute(select(Job.kind, Job.state)).all()) == {
            "dataset.build": "succeeded", "train": "cancelled",
        }  # fmt: skip


def test_nothing_to_build_from_fails_the_job_with_the_reason(world: World, settings: Settings) -> None:
    world.accepted("cut", "and then", finish_reason="length")

    with claim(world, start(world)) as lease, pytest.raises(JobFailed, match="1 accepted although cut off"):
        build_job(lease, settings)
    with pytest.raises(Unprocessable, match="no reviewed example"):
        build(world)
    with world.sessions() as session:
        assert session.scalars(select(Revision)).all() == []
