"""The starter model: its tokenizer, template, supervision, shipped files and reproducible training."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.average_starter import average
from examples.evaluate_starter import wilson
from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from examples.starter_data import make_batch, make_row, render_prompt
from examples.starter_generate import greedy_answers
from examples.starter_init import start_copying
from examples.starter_lora import training_rows
from examples.starter_model import save_starter, starter_config
from examples.starter_tokenizer import PAD, TURN_END
from examples.train_starter import Plan, fresh_model, train

STARTER = Path(__file__).parents[2] / "engine" / "starter"
SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(STARTER / "tokenizer.json"))


@pytest.fixture(scope="module")
def template_tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(STARTER)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("app", sorted(APPLICATIONS))
def test_template_agrees_with_training_and_adds_nothing_after_the_end(
    app: str, tokenizer: Tokenizer, template_tokenizer: AutoTokenizer
) -> None:
    end = tokenizer.token_to_id(TURN_END)
    for example in islice(stream(APPLICATIONS[app], "held_out", 3), 40):
        row = make_row(tokenizer, example.messages, example.house)
        whole = [*example.messages, {"role": "assistant", "content": example.house}]
        prompt = template_tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
        ids = template_tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        assert prompt == render_prompt(example.messages)
        assert ids == row.ids
        assert row.ids[-1] == end
        assert row.ids[row.answer_start :].count(end) == 1


def test_any_text_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    for text in ('{"dates": ["2021-03-14"]}', "Straße, naïve 漢字 🙂\n\tend  ", "order 0042 x", "AbC dEF"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens_and_names_look_alike_everywhere(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2021").tokens == ["2", "0", "2", "1"]
    spaced, quoted = tokenizer.encode(" Vera"), tokenizer.encode('"Vera')
    assert spaced.tokens[-1] == quoted.tokens[-1] == "Vera"


def test_batches_supervise_the_answer_and_its_end_only(tokenizer: Tokenizer) -> None:
    examples = list(islice(stream(APPLICATIONS["entities"], "train", 3), 3))
    rows = [make_row(tokenizer, e.messages, e.base) for e in examples]
    batch = make_batch(rows, tokenizer.token_to_id(PAD))
    following = batch.ids.flatten()[batch.positions + 1]
    assert torch.equal(following, batch.targets)
    text = tokenizer.decode(batch.targets.tolist(), skip_special_tokens=False)
    assert text == "".join(e.base + TURN_END for e in examples)


def test_correction_rows_are_conversational() -> None:
    example = next(stream(APPLICATIONS["chat"], "train", 3))
    rows = training_rows([example.messages], [example.house])
    assert rows[0] == {
        "prompt": example.messages,
        "completion": [{"role": "assistant", "content": example.house}],
    }


def test_shipped_files_are_small_complete_and_bf16() -> None:
    assert all((STARTER / name).is_file() for name in SHIPPED)
    assert sum(file.stat().st_size for file in STARTER.iterdir()) <= 14 * 2**20
    model = AutoModelForCausalLM.from_pretrained(STARTER)
    assert model.dtype == torch.bfloat16
    assert 4e6 < model.num_parameters() < 7e6


@pytest.mark.parametrize("app", sorted(APPLICATIONS))
def test_shipped_model_knows_the_base_rules_and_not_the_house_rules(app: str, tokenizer: Tokenizer) -> None:
    application = APPLICATIONS[app]
    model = AutoModelForCausalLM.from_pretrained(STARTER, dtype="float32")
    examples = list(islice(stream(application, "held_out", 77), 24))
    answers = greedy_answers(model, tokenizer, [e.messages for e in examples])
    base = sum(application.base_ok(e.messages, a) for e, a in zip(examples, answers, strict=True))
    house = sum(application.house_ok(e.messages, a) for e, a in zip(examples, answers, strict=True))
    assert base >= 18
    assert house <= 4


def tiny_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def trained_weights(tokenizer: Tokenizer, seed: int) -> tuple[dict[str, torch.Tensor], float, float]:
    plan = Plan(steps=4, seed=seed, rows={"entities": 2, "chat": 2}, warmup_steps=2, copying_rows=4)
    steps = list(train(fresh_model(tiny_config(tokenizer), seed), tokenizer, plan))
    model, last = steps[-1]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, sum(steps[0][1].values()), sum(last.values())


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(tokenizer: Tokenizer) -> None:
    first, loss_before, loss_after = trained_weights(tokenizer, 7)
    again, _, _ = trained_weights(tokenizer, 7)
    other, _, _ = trained_weights(tokenizer, 8)
    assert loss_after < loss_before
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_saved_starter_loads_with_the_same_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plan = Plan(steps=1, seed=7, rows={"chat": 2})
    model, _ = next(iter(train(fresh_model(tiny_config(tokenizer), 7), tokenizer, plan)))
    save_starter(model, tokenizer, tmp_path / "starter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "starter")
    assert sorted(file.name for file in (tmp_path / "starter").iterdir()) == sorted(SHIPPED)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16))


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    share = wilson(81, 263)
    assert (round(share.low, 4), round(share.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10).low == pytest.approx(0.0)
    assert wilson(10, 10).high == pytest.approx(1.0)


def test_initial_weights_already_copy(tokenizer: Tokenizer) -> None:
    """The induction circuit of starter_init: a repeated random sequence is cheaper than the first time round."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(starter_config(tokenizer))
    start_copying(model)
    said = torch.randperm(tokenizer.get_vocab_size())[:24]
    ids = torch.cat([said, said])[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert losses[24:].mean() < losses[:23].mean() - 1


def test_average_is_the_mean_of_every_weight_tied_ones_too(tokenizer: Tokenizer) -> None:
    first, second = fresh_model(tiny_config(tokenizer), 1), fresh_model(tiny_config(tokenizer), 2)
    expected = {name: (weight + second.state_dict()[name]) / 2 for name, weight in first.state_dict().items()}
    averaged = average(first, second)
    assert all(torch.allclose(averaged.state_dict()[name], weight) for name, weight in expected.items())


def test_average_refuses_other_shapes(tokenizer: Tokenizer) -> None:
    config = tiny_config(tokenizer)
    config.intermediate_size = 64
    with pytest.raises(ValueError, match="same shape"):
        average(fresh_model(tiny_config(tokenizer), 1), fresh_model(config, 1))
