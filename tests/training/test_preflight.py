"""Preflight: what is wrong with the data is said before any compute."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from transformers import AutoTokenizer

from engine.text.supervision import turn_end
from engine.text.tokenizer import Tokenizer
from services.store.base import uuid7
from services.store.models import Example, InteractionBody
from services.store.traffic import Rendering
from tests.training.tiny import TEMPLATE, make_model
from worker.training.lora import confirm
from worker.training.preflight import Preflight, check, rendering_since
from worker.training.process import Refused
from worker.training.rows import IGNORED, Bodies, make_rows
from worker.training.spec import ReferenceRow


def example(prompt: str, completion: str, split: str = "train", **fields: object) -> Example:
    values = {"interaction_id": None, "group_key": uuid4().hex} | fields
    return Example(
        id=uuid4(), split=split, completion=completion, messages=[{"role": "user", "content": prompt}], **values
    )


def fine(count: int) -> list[Example]:
    return [example(f"say number {index}", f"the answer is {index}") for index in range(count)]


def checked(
    tokenizer: Tokenizer,
    train: list[Example],
    held_out: list[Example] | None = None,
    *,
    bodies: Bodies | None = None,
    max_length: int = 64,
) -> Preflight:
    return check(tokenizer, train, held_out or [], bodies or {}, max_length)


def test_the_loss_covers_the_answer_and_the_end_token_and_nothing_else(tokenizer: Tokenizer) -> None:
    [row] = make_rows(tokenizer, [example("say number 1", "the answer is 1")])

    end = tokenizer.backend.token_to_id("<|im_end|>")
    supervised = [label for label in row.labels if label != IGNORED]
    assert supervised == [*tokenizer.encode("the answer is 1"), end]
    assert row.input_ids[: len(row.prompt)] == tokenizer.encode_chat([{"role": "user", "content": "say number 1"}])
    assert row.input_ids[-1] == row.labels[-1] == end


def test_a_control_token_typed_into_an_answer_stays_text(tokenizer: Tokenizer) -> None:
    [row] = make_rows(tokenizer, [example("say number 1", "one<|im_end|>two")])

    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert row.answer.count(end) == 0
    assert tokenizer.decode(row.answer) == "one<|im_end|>two"


def test_good_data_passes_with_a_histogram_of_what_is_supervised(tokenizer: Tokenizer) -> None:
    ready = checked(tokenizer, fine(20), [example("held", "out", "held_out")])

    assert ready.reasons == []
    assert ready.report["verdict"] == "ok"
    assert ready.report["rows_trained"] == 20
    tokens = ready.report["supervised_tokens"]
    assert tokens["sum"] == sum(label != IGNORED for row in ready.rows for label in row.labels)
    assert sum(tokens["buckets"].values()) == 20


def test_rows_without_a_label_or_cut_short_are_listed_and_left_out(tokenizer: Tokenizer) -> None:
    empty, long = example("nothing", ""), example("long", "number " * 80)

    ready = checked(tokenizer, [*fine(30), empty, long])

    assert ready.reasons == []
    assert {row["example"]: row["cause"] for row in ready.report["refused_rows"]} == {
        str(empty.id): "nothing to learn: the answer is empty",
        str(long.id): "the answer would be truncated",
    }
    assert {row.example_id for row in ready.rows}.isdisjoint({str(empty.id), str(long.id)})


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (example("nothing", ""), "nothing to learn"),
        (example("long", "number " * 80), "would be truncated"),
        (example("number " * 80, "long"), "the prompt alone is too long"),
    ],
)
def test_many_such_rows_refuse_the_run(tokenizer: Tokenizer, bad: Example, cause: str) -> None:
    bads = [example(bad.messages[0]["content"], bad.completion or "") for _ in range(3)]

    ready = checked(tokenizer, [*fine(10), *bads])

    assert ready.report["verdict"] == "refused"
    assert len(ready.reasons) == 1
    assert cause in ready.reasons[0]


def test_a_row_longer_than_the_models_context_is_refused_whatever_max_length_says(tokenizer: Tokenizer) -> None:
    ready = checked(tokenizer, [*fine(30), example("long", "number " * 150)], max_length=4096)

    assert ready.report["max_length"] == 128
    assert ready.report["refused"] == {"the answer would be truncated": 1}


def test_an_empty_training_part_is_refused(tokenizer: Tokenizer) -> None:
    assert checked(tokenizer, []).reasons == ["the revision has no training rows"]


def body_for(tokenizer: Tokenizer, one: Example, **fields: object) -> InteractionBody:
    one.interaction_id = uuid7()
    values: dict[str, Any] = {
        "prompt_token_ids": tokenizer.encode_chat(one.messages), "tokenizer_hash": tokenizer.digest,
        "template_hash": tokenizer.template_digest, "worked_examples": [],
    }  # fmt: skip
    return InteractionBody(id=one.interaction_id, **(values | fields))


def test_a_prompt_that_renders_to_other_ids_than_were_served_refuses_the_run(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    same, drifted, also, older = rows = fine(4)
    bodies = [
        body_for(tokenizer, same),
        body_for(tokenizer, drifted, prompt_token_ids=[1, 2, 3]),
        body_for(tokenizer, also, prompt_token_ids=[1, 2, 3]),
        body_for(tokenizer, older, prompt_token_ids=[1, 2, 3], template_hash="another"),
    ]

    monkeypatch.setattr("worker.training.preflight.LISTED", 1)
    ready = checked(tokenizer, rows, bodies={body.id: body for body in bodies})

    assert ready.reasons == ["template drift: 2 prompts no longer render to the token ids that were served"]
    template = ready.report["template"]
    assert (template["equal_to_served"], template["served_under_another"]) == (1, 1)
    assert template["different"] == [str(drifted.id)]


NOW = datetime(2026, 11, 30, 9, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"template": "another"}, "another chat template"),
        ({"tokenizer": "another"}, "another tokenizer"),
        ({"template": "another", "tokenizer": "another"}, "another tokenizer and chat template"),
    ],
)
def test_a_trainer_whose_template_is_not_the_one_that_serves_refuses_the_run(
    tokenizer: Tokenizer, other: dict[str, str], named: str
) -> None:
    """Every row was served under the other one, so no row can show it."""
    serving = Rendering(**{"tokenizer": tokenizer.digest, "template": tokenizer.template_digest, "at": NOW} | other)
    rows = fine(4)
    hashes = {"tokenizer_hash": serving.tokenizer, "template_hash": serving.template}
    bodies = {body.id: body for body in (body_for(tokenizer, one, **hashes) for one in rows)}

    ready = check(tokenizer, rows, [], bodies, 64, served=serving)

    assert ready.report["template"]["served_under_another"] == 4
    assert ready.reasons == [
        f"template drift: {named} than the trainer's rendered what was served last, at 2026-11-30 09:05 UTC"
    ]


def test_rows_of_an_older_template_are_fine_while_todays_is_the_one_that_serves(tokenizer: Tokenizer) -> None:
    rows = fine(4)
    bodies = {body.id: body for body in (body_for(tokenizer, one, template_hash="older") for one in rows)}
    serving = Rendering(tokenizer.digest, tokenizer.template_digest, NOW)

    assert check(tokenizer, rows, [], bodies, 64, served=serving).reasons == []
    assert check(tokenizer, rows, [], bodies, 64, served=None).reasons == [], "upgraded, and nothing served since"


def test_a_copied_template_counts_from_its_copying_not_from_its_date(tmp_path: Path) -> None:
    """Copies keep the date of what they were made from; what was served before them was served by other files."""
    before = datetime.now(UTC)
    directory = make_model(tmp_path / "model")
    os.utime(directory / "tokenizer.json", (0, 0))

    assert before - timedelta(seconds=1) < rendering_since(directory) <= datetime.now(UTC) + timedelta(seconds=1)


def test_a_template_that_prints_the_day_is_rendered_with_the_day_it_was_served(tmp_path: Path) -> None:
    dated = "{{ '<|im_start|>' + strftime_now('%d %b %Y') + '<|im_end|>' }}"
    directory = make_model(tmp_path / "model", template=dated + TEMPLATE)
    tokenizer = Tokenizer.load(directory)
    served = datetime.now(UTC) - timedelta(days=3)
    [one] = fine(1)
    body = body_for(tokenizer, one, prompt_token_ids=tokenizer.encode_chat(one.messages, at=served))
    assert body.prompt_token_ids != tokenizer.encode_chat(one.messages)
    one.interaction_id = body.id = uuid7(served.timestamp())

    ready = checked(tokenizer, [one], bodies={body.id: body})

    assert ready.reasons == []
    assert ready.rows[0].prompt == body.prompt_token_ids
    theirs = AutoTokenizer.from_pretrained(directory)
    confirm([ReferenceRow(one.messages, ready.rows[0].prompt, at=served)], theirs)
    with pytest.raises(Refused, match="template drift"):
        confirm([ReferenceRow(one.messages, ready.rows[0].prompt)], theirs)


def test_prompts_that_spell_a_control_token_do_not_count_as_confirmed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(make_model(tmp_path / "model"))
    plain, spelled = example("say 1", "1"), example(f"say {theirs.eos_token}", "1")

    rows = [ReferenceRow(one.messages, tokenizer.encode_chat(one.messages)) for one in (plain, spelled, plain)]

    assert confirm(rows, theirs) == 2


def test_a_prompt_or_group_on_both_sides_of_the_split_refuses_the_run(tokenizer: Tokenizer) -> None:
    prompt = checked(tokenizer, fine(3), [example("say number 1", "x", "held_out")])
    group = checked(tokenizer, [example("a", "b", group_key="g")], [example("c", "d", "held_out", group_key="g")])

    assert prompt.reasons == ["leak of held-out rows: 1 prompts and 0 groups are on both sides of the split"]
    assert group.reasons == ["leak of held-out rows: 0 prompts and 1 groups are on both sides of the split"]


def test_a_template_that_ends_answers_where_the_engine_goes_on_is_refused(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", template=TEMPLATE.replace("+ '<|im_end|>'", "+ '<|pad|>'"))

    ready = checked(Tokenizer.load(directory), fine(3))

    assert ready.rows == []
    assert "at which the engine does not stop" in ready.reasons[0]


def test_the_turn_ends_with_the_token_the_engine_stops_at(tokenizer: Tokenizer) -> None:
    assert turn_end(tokenizer) == tokenizer.backend.token_to_id("<|im_end|>")
