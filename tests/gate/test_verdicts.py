"""Whose word counts on an identical output, and whose does not."""

import json
from pathlib import Path
from uuid import UUID

from services.store import base_ability, datasets, imports, people, reviews, verdicts
from services.store.base import uuid7
from services.store.imports import parse
from services.store.models import Example, Run
from tests.curation.world import World

ROOT = Path(__file__).parents[2]


def said(world: World, output: str, *judged: str, split: str = "held_out", prompt: str = "where is Oslo?") -> UUID:
    """An item on which reviewers said these, one each."""
    item = world.item(world.log(prompt, output), split)
    for reviewer, verdict in enumerate(judged):
        world.judge(item, verdict, "In Norway." if verdict == "correct" else None, reviewer=reviewer)
    return item


def verdict(world: World, output: str, prompt: str = "where is Oslo?") -> float | None:
    asked = verdicts.asked([{"role": "user", "content": prompt}], output)
    with world.sessions() as session:
        return verdicts.of_outputs(session, world.project_id, [asked]).get(asked)


def test_accepted_is_right_and_rejected_is_wrong(world: World) -> None:
    said(world, "Norway", "accept", "accept")
    said(world, "Sweden", "reject", "reject")

    assert verdict(world, "Norway") == 1
    assert verdict(world, "Sweden") == 0
    assert verdict(world, "norway") is None
    assert verdict(world, "Norway", "where is Bergen?") is None


def test_where_people_disagree_or_corrected_nothing_is_known(world: World) -> None:
    said(world, "Norway", "accept", "reject")
    said(world, "norway", "correct", "correct")

    assert verdict(world, "Norway") is None
    assert verdict(world, "norway") is None


def test_an_adjudication_wins(world: World) -> None:
    said(world, "Norway", "accept", "reject")
    with world.sessions.begin() as session:
        lead = people.create_user(session, email="lead@example.org", name="Lead").id
        [held] = reviews.lease(session, world.project_id, lead, 1, queue="disputed")
        assert held.lease_token is not None
        decision = reviews.Judgement("reject", "decided", comment="It is a kingdom.")
        reviews.submit(session, world.project_id, held.id, lead, held.lease_token, decision)

    assert verdict(world, "Norway") == 0


def test_what_was_taken_back_or_judged_for_training_says_nothing(world: World) -> None:
    said(world, "Norway", "accept", split="train")
    item = world.item(world.log("where is Oslo?", "Sweden"), "held_out", overlap_target=1)
    undone = world.judge(item, "accept")
    world.undo(undone)

    assert verdict(world, "Norway") is None
    assert verdict(world, "Sweden") is None


# --- the base-ability set ---------------------------------------------------------------------------------


def chat(system: str | None, question: str, answer: str) -> str:
    """A line of a base-ability file."""
    before = [{"role": "system", "content": system}] if system else []
    said = [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": said})


def run(world: World) -> Run:
    """One that was taught nothing."""
    return Run(id=uuid7(), project_id=world.project_id)


def test_the_projects_own_task_is_left_out_of_the_shipped_set(world: World, tmp_path: Path) -> None:
    shipped = tmp_path / base_ability.SHIPPED
    shipped.write_text("\n".join([chat("Desk.", "a?", "A"), chat("News.", "b?", "B"), chat(None, "c?", "C")]) + "\n")
    own = Example(messages=[{"role": "system", "content": "Desk."}, {"role": "user", "content": "x"}], completion="y")

    with world.sessions.begin() as session:
        first = base_ability.examples(session, run(world), shipped, [own])
        again = base_ability.examples(session, run(world), shipped, [])
        none = base_ability.examples(session, run(world), tmp_path / "missing", [own])

    assert sorted(one.completion or "" for one in first.rows) == ["B", "C"]
    assert sorted(one.completion or "" for one in again.rows) == ["A", "B", "C"]
    assert sorted(one.completion or "" for one in none.rows) == ["B", "C"]
    assert [found.own_task for found in (first, again, none)] == [1, 0, 1]


def test_a_project_without_a_set_on_a_model_without_one_has_none(world: World, tmp_path: Path) -> None:
    with world.sessions.begin() as session:
        assert base_ability.examples(session, run(world), tmp_path / "missing", []) == base_ability.General([])
        assert datasets.list_(session, world.project_id) == []


def test_a_set_of_the_projects_own_replaces_the_shipped_one(world: World, tmp_path: Path) -> None:
    shipped = tmp_path / base_ability.SHIPPED
    shipped.write_text(chat(None, "shipped?", "no") + "\n")
    with world.sessions.begin() as session:
        dataset = datasets.get_or_create(session, world.project_id, base_ability.NAME)
        record = imports.begin(session, dataset, "mine.jsonl", chat(None, "mine?", "yes").encode(), "ada")
        imports.finish(session, record, None, "ada")

        found = base_ability.examples(session, run(world), shipped, [])

    assert [one.completion for one in found.rows] == ["yes"]


def test_the_starter_ships_a_set_that_imports_read() -> None:
    content = (ROOT / "engine/starter" / base_ability.SHIPPED).read_bytes()

    parsed = parse(base_ability.SHIPPED, content, None, "whet")

    assert parsed.refusal is None
    assert len(parsed.drafts) == 120
    assert len({draft.messages[0]["content"] for draft in parsed.drafts}) == 3
