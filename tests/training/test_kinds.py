"""SFT, DPO and KTO: TRL trains exactly the serving engine's ids, each kind learns, bad data is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import runs
from services.store.base import uuid7
from services.store.jobs import JobFailed
from services.store.models import Artifact, Example, InteractionBody, Run
from tests.curation.world import World
from tests.training.kinds import TOOLS, WITH_TOOLS, corrected, make_spec, rows_of
from tests.training.test_run import attempt, claim, events
from tests.training.tiny import make_model
from worker.curation.build import build_revision
from worker.training import lora, trainers
from worker.training.preflight import check
from worker.training.process import Refused
from worker.training.rows import Marked, Pair, Row, arranged, make_rows
from worker.training.run import train_job

KINDS = ("sft", "dpo", "kto")
QUICK = {"rank": 8, "alpha": 16, "lr": 0.01, "epochs": 4, "batch_size": 8, "max_length": 64}


def trainer_of(kind: str, model: Path, work: Path, rows: list[dict[str, Any]] | None = None, **changes: object) -> Any:  # noqa: ANN401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = make_spec(kind, model, work, **changes)
    written = [json.loads(line) for line in Path(spec.rows_file).read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    return trainers.make(
        spec, base, AutoTokenizer.from_pretrained(model), written if rows is None else rows, [], on_gpu=False
    )


def meant(rows: list[Any]) -> set[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Every sequence of the rows with what is learned of it."""
    return {
        ((*row.prompt, *answer), (*(False for _ in row.prompt), *(True for _ in answer)))
        for row in rows for answer in row.answers
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_the_serving_engine_will_be_prompted_with(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(kind, tiny_model, tmp_path)

    seen = set()
    for batch in trainer.get_train_dataloader():
        for ids, learned in trainers._seen(batch):
            seen.add((tuple(ids), tuple(learned)))

    rows = rows_of(kind, tiny_model)
    assert seen == meant(rows)
    tokenizer = Tokenizer.load(tiny_model)
    prompts = {tuple(tokenizer.encode_chat(example.messages)) for example in corrected(20)}
    assert {tuple(row.prompt) for row in rows} == prompts
    assert all(answer[-1] in tokenizer.eos_ids for row in rows for answer in row.answers)


def test_each_kind_gets_the_rows_it_learns_from(tokenizer: Tokenizer) -> None:
    one = corrected(1)
    [right] = make_rows(tokenizer, one, kind="sft")
    [pair] = make_rows(tokenizer, one, kind="dpo")
    good, bad = make_rows(tokenizer, one, kind="kto")

    assert isinstance(right, Row)
    assert isinstance(pair, Pair)
    assert isinstance(good, Marked)
    assert isinstance(bad, Marked)
    assert right.answers == [pair.chosen] == [good.completion]
    assert [pair.rejected] == [bad.completion]
    assert (good.good, bad.good) == (True, False)


def test_kto_compares_each_prompt_with_another_answer_of_its_batch(tiny_model: Path) -> None:
    columns = arranged(rows_of("kto", tiny_model, 17), 0, 4)

    assert len(columns) == 34
    for start in range(0, 34, 4):
        batch = columns[start : start + 4]
        answers = [one["completion_ids"] for one in batch]
        assert [one["KL_completion_ids"] for one in batch] == answers[-1:] + answers[:-1]


def test_a_collator_that_masks_every_label_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 4
    with pytest.raises(Refused, match="all labels of a row are masked"):
        trainer_of("sft", tiny_model, tmp_path, rows)


def test_a_collator_that_shifts_the_mask_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    trainer = trainer_of("dpo", tiny_model, tmp_path)
    rows = [dict(row) for row in trainer.train_dataset]
    whole = trainer.data_collator

    def shifted(batch: list[dict[str, Any]]) -> dict[str, Any]:
        made = whole(batch)
        made["completion_mask"] = made["completion_mask"].roll(-1, dims=1)
        return dict(made)

    trainer.data_collator = shifted
    with pytest.raises(Refused, match="other tokens or labels"):
        trainers.confirm(trainer, rows)


def test_kto_imitates_right_answers_beside_telling_them_from_wrong_ones(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    plain, both = (trainer_of("kto", tiny_model, tmp_path / str(weight), sft_weight=weight) for weight in (0.0, 0.5))
    batch = next(iter(both.get_train_dataloader()))
    right = batch["label"].bool()
    assert right.any()
    assert not right.all()

    added = both.compute_loss(both.model, batch) - plain.compute_loss(plain.model, batch)
    with torch.no_grad():
        logits = both.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nats = -logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    learned = batch["completion_mask"][:, 1:].bool() & right[:, None]
    torch.testing.assert_close(added, 0.5 * nats[learned].mean(), rtol=1e-4, atol=1e-5)

    added.backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in both.model.parameters())
    none_right = batch | {"label": torch.zeros_like(batch["label"])}
    assert both.compute_loss(both.model, none_right) == plain.compute_loss(plain.model, none_right)


# --- through the job --------------------------------------------------------------------------------------


def start(world: World, kind: str, **params: object) -> Run:
    for index in range(16):
        world.corrected(f"say number {index}", f"say {index} please", f"the answer is {index}")
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        return runs.start(
            session, world.project(session), params=QUICK | params, created_by="ada", revision=revision, kind=kind
        )


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_run_of_each_kind_learns_what_is_better_and_hands_over_to_the_gate(
    kind: str, world: World, tiny_settings: Settings
) -> None:
    run = start(world, kind, **({"label_smoothing": 0.1} if kind == "dpo" else {}))

    attempt(world, run, tiny_settings)

    told = [event.payload for event in events(world, run.id, "progress")]
    margins = [row["margin"] for row in told if row["margin"] is not None]
    assert margins[-1] > margins[0] + 0.2
    assert told[-1]["eta"] == 0.0
    with world.sessions() as session:
        done = session.get_one(Run, run.id)
        [built] = session.scalars(select(Artifact)).all()
    assert (done.phase, done.artifact_digest, built.manifest["training"]) == ("evaluating", built.digest, kind)
    assert done.preflight is not None
    assert done.preflight["rows_trained"] == (16 if kind == "dpo" else 32)


def test_a_loss_below_nothing_is_learning_only_where_pairs_may_be_the_wrong_way(
    tiny_model: Path, tmp_path: Path
) -> None:
    plain, smoothed = (make_spec("dpo", tiny_model, tmp_path, label_smoothing=share) for share in (0.0, 0.1))
    lora.require_learned(smoothed, -0.2)
    for spec, loss in ((plain, -0.2), (plain, 0.0), (smoothed, math.nan), (smoothed, -math.inf)):
        with pytest.raises(Refused, match="nothing was learned"):
            lora.require_learned(spec, loss)


def test_kto_without_a_wrong_answer_is_refused_before_any_compute(world: World, tiny_settings: Settings) -> None:
    for index in range(8):
        world.accepted(f"say number {index}", f"the answer is {index}")
    with world.sessions.begin() as session:
        project = world.project(session)
        project.config = {"accepted_share": 1.0}
        revision = build_revision(session, world.project_id, "golden")
        run = runs.start(session, project, params=QUICK, created_by="ada", revision=revision, kind="kto")

    with claim(world, run) as lease, pytest.raises(JobFailed, match="every answer is marked right: kto learns"):
        train_job(lease, tiny_settings)


# --- the preflight's own rules ----------------------------------------------------------------------------


def test_a_pair_whose_sides_are_the_same_is_left_out_by_name(tokenizer: Tokenizer) -> None:
    examples = corrected(20)
    examples[3].rejected = examples[3].completion

    ready = check(tokenizer, examples, [], {}, 64, "dpo")

    assert ready.report["refused"] == {"both answers of the pair are the same": 1}
    assert len(ready.rows) == 19
    assert ready.reasons == []


def test_masked_labels_are_named_when_the_prompt_fills_the_row(tokenizer: Tokenizer) -> None:
    ready = check(tokenizer, corrected(20), [], {}, 8)

    [reason] = ready.reasons
    assert reason.startswith("20 of 20 training rows cannot be trained on: all labels are masked in 20 of them")
    assert ready.report["no_label"] == 20


def test_examples_that_say_nothing_to_a_kind_are_counted_and_passed_over(tokenizer: Tokenizer) -> None:
    examples = corrected(10)
    for one in examples[:4]:
        one.kind, one.completion = "unpaired", None

    ready = check(tokenizer, examples, [], {}, 64, "dpo")

    assert (ready.report["rows"], ready.report["not_for_this_kind"]) == (6, 4)
    assert check(tokenizer, examples, [], {}, 64, "kto").report["marked"] == {"right": 6, "wrong": 10}


def test_a_chat_with_tools_is_rendered_with_them_as_it_was_served(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_model(tmp_path, template=WITH_TOOLS, context=512))
    [example] = corrected(1)
    example.interaction_id = uuid7()
    served = tokenizer.encode_chat(example.messages, tools=TOOLS)
    body = InteractionBody(
        id=example.interaction_id, prompt_token_ids=served, tokenizer_hash=tokenizer.digest,
        template_hash=tokenizer.template_digest, worked_examples=[], parameters={"tools": TOOLS},
    )  # fmt: skip

    ready = check(tokenizer, [example], [], {body.id: body}, 512)

    assert ready.reasons == []
    assert ready.report["template"]["equal_to_served"] == 1
    assert ready.rows[0].prompt == served
    assert served != tokenizer.encode_chat(example.messages)
    forced = body.parameters | {"tool_choice": "required"}
    body.parameters, body.prompt_token_ids = forced, [*served, *tokenizer.encode("<tool_call>\n")]
    assert check(tokenizer, [example], [], {body.id: body}, 512).reasons == []


def test_an_example_without_its_log_row_is_still_an_example(tokenizer: Tokenizer) -> None:
    [example] = corrected(1)
    example.interaction_id = uuid7()
    assert isinstance(example, Example)
    assert check(tokenizer, [example], [], {}, 64).reasons == []
