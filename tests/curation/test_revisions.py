"""Revisions: differences with their causes, rebuilding, the held-out digest, personal data, exports that TRL reads."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from services import cli
from services.cli_datasets import to_parquet
from services.store import dataset_export, evaluations, revision_diff, revisions
from services.store.forms import FORMS, Form
from services.store.models import Artifact, Evaluation, Example, Revision
from tests.curation.world import World, make_world
from worker.curation.build import build_revision


def build(world: World, dataset: str = "golden") -> Revision:
    with world.sessions.begin() as session:
        return build_revision(session, world.project_id, dataset)


def explained(world: World, old: Revision, new: Revision) -> revision_diff.Explained:
    with world.sessions() as session:
        return revision_diff.explain(session, old, new)


def test_every_change_has_its_cause(world: World) -> None:
    world.configure(accepted_share=1)
    world.corrected("kept", "wrong answer", "right answer")
    lonely = world.item(world.log("lonely"), "held_out")
    world.judge(lonely, "correct", "much better", 0)
    gone = world.item(world.log("gone", "wrong answer"))
    taken_back = world.judge(gone, "correct", "mistaken answer")
    fixed = world.item(world.log("fixed", "wrong answer"))
    hasty = world.judge(fixed, "correct", "hasty answer")
    world.accepted("torn", "fine", group="torn group")
    old = build(world)

    world.judge(lonely, "correct", "much better", 1)
    world.undo(taken_back)
    world.undo(hasty)
    world.judge(fixed, "correct", "careful answer")
    world.corrected("new", "wrong answer", "right answer")
    world.corrected("held", "wrong answer", "right answer", "held_out", group="torn group")
    new = build(world)

    assert explained(world, old, new).causes() == {
        "added": {"newly judged": 2, "before: needs another reviewer": 1},
        "removed": {"its judgement was taken back": 1, "its group is held out": 1},
        "changed": {"the answer changed": 1},
    }
    assert explained(world, old, new).kept == 1
    assert explained(world, new, new).changes == []


def test_a_rebuild_gives_the_digests_again_and_notices_any_edit(world: World) -> None:
    world.configure(accepted_share=1)
    for index in range(4):
        world.corrected(f"train {index}", "wrong answer", f"right answer {index}")
        world.corrected(f"held {index}", "wrong answer", f"right answer {index}", "held_out")
    revision = build(world)
    with world.sessions.begin() as session:
        assert revisions.rebuild(session, revision.id) == (revision.digest, revision.held_out_digest, 8, [], 0)
        edited = revisions.members(session, revision.id, "held_out", limit=1)[0].example.id
        session.execute(update(Example).where(Example.id == edited).values(completion="edited"))
    with world.sessions() as session:
        made = revisions.rebuild(session, revision.id)
    assert made.changed == [edited]
    assert made.digest != revision.digest
    assert made.held_out_digest != revision.held_out_digest


def test_a_row_moved_to_the_other_side_in_its_revision_is_refused_and_would_be_noticed(world: World) -> None:
    for number in range(2):
        world.corrected(f"question {number}", "wrong", f"right {number}", "held_out")
    revision = build(world)
    moving = text("UPDATE revision_example SET split = 'train' WHERE position = 0")
    with world.sessions.begin() as session:
        for change in (moving, text("UPDATE revision SET held_out_count = 0")):
            with pytest.raises(DBAPIError, match="append-only"), session.begin_nested():
                session.execute(change)
        session.execute(text("ALTER TABLE revision_example DISABLE TRIGGER refuse_change"))  # as its owner might
        session.execute(moving)
        made = revisions.rebuild(session, revision.id)
        session.rollback()
    assert len(made.changed) == 1
    assert made.digest != revision.digest


def test_a_look_counts_for_every_revision_that_shares_most_of_the_held_out_part(world: World) -> None:
    world.corrected("held", "wrong answer", "right answer", "held_out")
    world.corrected("train", "wrong answer", "right answer")
    first = build(world)
    world.corrected("more", "wrong answer", "right answer")
    second = build(world)
    world.corrected("held too", "wrong answer", "right answer", "held_out")
    third = build(world)
    for number in range(3):
        world.corrected(f"fresh {number}", "wrong answer", "right answer", "held_out")
    fresh = build(world)

    with world.sessions.begin() as session:
        revisions.count_look(session, first.id, 0.025)
        assert revisions.lock_looks(session, third.id) == (1, 0.025)
        revisions.count_look(session, third.id)
        session.add(
            Artifact(
                digest="ab", kind="adapter", project_id=world.project_id, base_digest="base", manifest={}, state="built"
            )
        )
        session.flush()
        looked = [
            Evaluation(project_id=world.project_id, revision_id=one.id, candidate_digest="ab", decision="refuse")
            for one in (first, third, fresh)
        ]
        session.add_all(looked)
        session.flush()
        assert set(evaluations.looks_at(session, looked[1])) == set(looked[:2])

    assert first.held_out_digest == second.held_out_digest != third.held_out_digest
    with world.sessions() as session:
        counted = [session.get_one(Revision, one.id).looks for one in (first, second, third, fresh)]
    assert counted == [2, 2, 2, 0]


def test_another_data_set_buys_no_fresh_looks_at_the_same_held_out_rows(world: World) -> None:
    for number in range(3):
        world.corrected(f"held {number}", "wrong answer", "right answer", "held_out")
    first = build(world)
    with world.sessions.begin() as session:
        revisions.count_look(session, first.id, 0.025)

    renamed = build(world, "golden2")

    with world.sessions.begin() as session:
        assert revisions.lock_looks(session, renamed.id) == (1, 0.025)
        revisions.count_look(session, renamed.id)
        assert revisions.lock_looks(session, first.id) == (2, 0.0)
    other = make_world(world.sessions, "other")
    for number in range(3):
        other.corrected(f"held {number}", "wrong answer", "right answer", "held_out")
    elsewhere = build(other)
    with world.sessions.begin() as session:
        assert revisions.lock_looks(session, elsewhere.id) == (0, 0.0)


def test_of_several_counts_the_longest_is_shared(world: World) -> None:
    world.corrected("held", "wrong answer", "right answer", "held_out")
    first = build(world)
    second = build(world, "golden2")
    with world.sessions.begin() as session:  # as releases left them that counted each data set by itself
        session.execute(update(Revision).where(Revision.id == second.id).values(look_budget=None))
        revisions.count_look(session, first.id)

    third = build(world, "golden3")

    with world.sessions.begin() as session:
        assert revisions.lock_looks(session, third.id).taken == 1


def test_two_data_sets_built_at_once_share_their_looks(world: World) -> None:
    world.corrected("held", "wrong answer", "right answer", "held_out")
    with ThreadPoolExecutor(1) as pool, world.sessions() as session:
        first = build_revision(session, world.project_id, "golden")
        beside = pool.submit(build, world, "golden2")
        with pytest.raises(TimeoutError):
            beside.result(1)
        session.commit()
        second = beside.result(30)

    with world.sessions() as session:
        assert revisions.budget_of(session, second.id) == revisions.budget_of(session, first.id) == first.id


def test_rejected_answers_and_unpaired_corrections_reach_their_forms(world: World) -> None:
    world.judge(world.item(world.log("bad", "a terrible answer")), "reject")
    world.corrected("typo", "we recieve all of your many letters today", "we receive all of your many letters today")
    revision = build(world)
    assert revision.report["forms"] == {"prompt-completion": 1, "preference": 0, "unpaired": 2}
    assert revision.report["pairs_left_out"] == {"the two answers hardly differ": 1}


@pytest.mark.parametrize(
    ("mode", "prompt", "kinds"),
    [
        ("off", "I am bob@example.com", []),
        ("tag", "I am bob@example.com", ["email"]),
        ("mask", "I am [EMAIL]", ["email"]),
    ],
)
def test_personal_data_is_left_marked_or_masked_as_the_project_says(
    world: World, mode: str, prompt: str, kinds: list[str]
) -> None:
    world.configure(pii=mode)
    world.corrected("I am bob@example.com", "wrong answer", "right answer")
    revision = build(world)
    with world.sessions() as session:
        example = revisions.members(session, revision.id)[0].example
        assert (example.messages[0]["content"], example.pii) == (prompt, kinds)
        assert revisions.rebuild(session, revision.id).digest == revision.digest


# --- exports ----------------------------------------------------------------------------------------------


@pytest.fixture
def exported(world: World) -> Revision:
    world.configure(accepted_share=1)
    parts = [{"role": "system", "content": None}, {"role": "user", "content": [{"type": "text", "text": "2021-03-04"}]}]
    world.corrected("parts", "wrong answer", "2021-03-04", messages=parts)
    world.corrected("one", "wrong answer", "right answer\u2028two lines")
    world.accepted("two", "fine")
    world.judge(world.item(world.log("three", "a terrible answer")), "reject")
    world.corrected("held", "wrong answer", "right answer", "held_out")
    return build(world)


def write(world: World, revision: Revision, form: Form, path: Path) -> int:
    lines = list(dataset_export.lines(world.sessions, revision.id, form, "train"))
    path.write_bytes(b"".join(lines))
    return len(lines)


@pytest.mark.parametrize(("form", "rows"), [("prompt-completion", 3), ("preference", 2), ("unpaired", 6)])
def test_datasets_and_trl_read_what_is_exported(
    world: World, exported: Revision, tmp_path: Path, form: Form, rows: int
) -> None:
    from datasets import Dataset
    from trl.data_utils import is_conversational, unpair_preference_dataset

    path = tmp_path / "train.jsonl"
    assert write(world, exported, form, path) == rows
    to_parquet(path)
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    read = Dataset.from_parquet(str(path.with_suffix(".parquet")), cache_dir=str(tmp_path / "cache"))
    assert len(read) == rows
    wanted: dict[str, set[str]] = {
        "prompt-completion": {"prompt", "completion"}, "preference": {"prompt", "chosen", "rejected"},
        "unpaired": {"prompt", "completion", "label"},
    }  # fmt: skip
    assert set(read.column_names) == wanted[form] | {"tools", "example", "split"}
    for row, line in zip(read, lines, strict=True):
        assert is_conversational(row)
        assert {name: _bare(row[name]) for name in row} == {name: _bare(line[name]) for name in line}
    if form == "preference":
        plain = read.remove_columns(["tools", "example", "split"])
        assert len(unpair_preference_dataset(plain)) == 2 * rows


def _bare(value: object) -> object:
    """Without the nulls a table has where a message lacks a field."""
    if isinstance(value, list):
        return [{key: item for key, item in message.items() if item is not None} for message in value]
    return value


def test_every_form_of_every_example_is_told_in_the_report(world: World, exported: Revision, tmp_path: Path) -> None:
    for form in FORMS:
        count = len(list(dataset_export.lines(world.sessions, exported.id, form)))
        assert exported.report["forms"][form] == count


def test_the_commands_exist_and_refuse_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    into = ["--to", str(tmp_path / "full")]
    refused = CliRunner().invoke(cli.app, ["dataset", "export", uuid4().hex, *into])
    assert refused.exit_code == 1
    assert "is not empty" in refused.output
    unknown = CliRunner().invoke(cli.app, ["dataset", "export", uuid4().hex, "--kind", "poems", *into])
    assert "prompt-completion, preference, unpaired" in unknown.output
