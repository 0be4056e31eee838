"""Decoders asked for vectors: pooled states and classification heads, under adapters too, equal to transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from engine.adapters.files import AdapterRefused
from engine.client import PoolFailed
from engine.digest import base_digest
from engine.messages import Generate, Pool, Pooled, Sampling
from engine.models.spec import UnsupportedModel
from engine.offline import LocalEngine
from tests.engine.conftest import SHAPE, EngineMaker, reference_logits, seal, write_artifact

PROMPTS = [[5, 6, 7], list(range(10, 75)), [9], [4, 8, 15, 16, 23, 42] * 5]
LABELS = 3


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a head of three labels."""
    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("classifier")
    LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=LABELS)).save_pretrained(directory)
    return directory


def classifier(directory: Path) -> PreTrainedModel:
    # One prompt at a time has no padding, but transformers insists on knowing it for more.
    return LlamaForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def expected_scores(model: Any) -> torch.Tensor:  # noqa: ANN401 - PEFT's and transformers' models alike
    return torch.stack([model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])


def adapt(directory: Path, seed: int, **options: object) -> PeftModel:
    """A PEFT LoRA on a classifier, random in every weight it trains."""
    adapted = get_peft_model(classifier(directory), LoraConfig(r=4, lora_alpha=8, **options))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return adapted.eval()


@pytest.mark.parametrize("step_tokens", [512, 16])
def test_pooled_states_equal_transformers_in_a_batch_and_in_chunks(
    step_tokens: int, model_dir: Path, make_engine: EngineMaker
) -> None:
    engine = make_engine(model_dir, step_tokens=step_tokens)
    body = LlamaModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = [body(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    for how, pick in {"last": lambda x: x[-1], "first": lambda x: x[0], "mean": lambda x: x.mean(dim=0)}.items():
        expected = torch.stack([pick(x) for x in states])
        assert (engine.embed(PROMPTS, how) - expected).abs().max() < 1e-4, how


def test_vectors_are_made_beside_requests_that_generate(model_dir: Path, make_engine: EngineMaker) -> None:
    engine = make_engine(model_dir, step_tokens=16)
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=12)
    alone, vector = engine.generate([PROMPTS[1]], sampling)[0].token_ids, engine.embed([PROMPTS[3]], "mean")[0]
    core = engine.core
    core.submit(b"c", Generate(id="g", prompt=PROMPTS[1], sampling=sampling))
    core.submit_pool(b"c", Pool(id="p", prompt=PROMPTS[3], how="mean"))
    while core.step():
        continue
    [pooled] = [message for _, message in core.outbox if isinstance(message, Pooled)]
    tokens = [token for _, message in core.outbox for token in getattr(message, "token_ids", [])]
    assert tokens == alone
    found = torch.frombuffer(bytearray(pooled.vector), dtype=torch.float32)
    assert (found - vector).abs().max() < 1e-4


@pytest.mark.parametrize("step_tokens", [512, 16])
def test_scores_equal_transformers(step_tokens: int, classifier_dir: Path, make_engine: EngineMaker) -> None:
    engine = make_engine(classifier_dir, step_tokens=step_tokens)
    scores = engine.embed(PROMPTS, "classify")
    assert (scores - expected_scores(classifier(classifier_dir))).abs().max() < 1e-4
    assert engine.core.status("s").labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_padding_at_the_end_is_not_what_the_head_reads(
    tmp_path: Path, classifier_dir: Path, make_engine: EngineMaker
) -> None:
    model = classifier(classifier_dir)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    padded = [[5, 6, 7, 0, 0], [0, 0], [0, 5]]
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0] for prompt in padded])
    assert (make_engine(tmp_path).embed(padded, "classify") - expected).abs().max() < 1e-4


def test_a_cached_beginning_gives_the_same_vector(model_dir: Path, make_engine: EngineMaker) -> None:
    core = make_engine(model_dir).core
    pooled: dict[str, Pooled] = {}
    for name, how in {"cold": "last", "warm": "last", "whole": "mean"}.items():
        core.submit_pool(b"c", Pool(id=name, prompt=PROMPTS[1], how=how))
        while core.step():
            continue
        pooled[name] = core.outbox.pop()[1]
    assert [pooled[name].cached_tokens > 0 for name in ("cold", "warm", "whole")] == [False, True, False]
    cold, warm = (torch.frombuffer(bytearray(pooled[name].vector), dtype=torch.float32) for name in ("cold", "warm"))
    assert (cold - warm).abs().max() < 1e-4


ADAPTERS: dict[str, dict[str, Any]] = {
    "head_saved": {"task_type": TaskType.SEQ_CLS, "target_modules": ["q_proj", "down_proj"]},
    "head_low_rank": {"target_modules": ["v_proj", "score"], "use_rslora": True},
    "head_untouched": {"target_modules": ["o_proj", "gate_proj"]},
}


def test_every_adapter_classifies_with_its_own_head_in_one_batch(
    classifier_dir: Path, artifacts: Path, make_engine: EngineMaker
) -> None:
    engine = make_engine(classifier_dir)
    base = expected_scores(classifier(classifier_dir))
    expected: dict[str | None, torch.Tensor] = {None: base}
    for seed, options in enumerate(ADAPTERS.values()):
        adapted = adapt(classifier_dir, seed, **options)
        digest = engine.load_adapter(artifacts / write_artifact(artifacts, base_digest(classifier_dir), adapted))
        expected[digest] = expected_scores(adapted.merge_and_unload())
        assert (expected[digest] - base).abs().max() > 0.05
    core = engine.core
    for number, digest in enumerate(expected):
        for index, prompt in enumerate(PROMPTS):
            core.submit_pool(b"c", Pool(id=f"{number} {index}", prompt=prompt, how="classify", adapter=digest))
    while core.step():
        continue
    for _, message in core.outbox:
        assert isinstance(message, Pooled), message
        number, index = map(int, message.id.split())
        found = torch.frombuffer(bytearray(message.vector), dtype=torch.float32)
        assert (found - list(expected.values())[number][index]).abs().max() < 1e-4, message.id


def test_a_slot_used_again_keeps_nothing_of_the_head_before(
    classifier_dir: Path, artifacts: Path, make_engine: EngineMaker
) -> None:
    engine = make_engine(classifier_dir, adapter_slots=2)
    base = base_digest(classifier_dir)
    for seed, name in enumerate(("head_saved", "head_untouched", "head_low_rank", "head_untouched")):
        adapted = adapt(classifier_dir, seed, **ADAPTERS[name])
        digest = engine.load_adapter(artifacts / write_artifact(artifacts, base, adapted))
        found = engine.embed(PROMPTS, "classify", digest)
        assert (found - expected_scores(adapted.merge_and_unload())).abs().max() < 1e-4, name
        engine.core.adapters.slots.drain(digest)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [("missing", "holds none"), ("shape", "has shape"), ("nan", "NaN"), ("unannounced", "no place in this base")],
)
def test_broken_heads_are_refused(
    how: str, complaint: str, classifier_dir: Path, artifacts: Path, make_engine: EngineMaker
) -> None:
    draft = artifacts / "draft"
    adapt(classifier_dir, 1, **ADAPTERS["head_saved"]).save_pretrained(draft)
    weights = load_file(draft / "adapter_model.safetensors")
    name = "base_model.model.score.weight"
    if how == "missing":
        del weights[name]
    elif how == "shape":
        weights[name] = torch.zeros(LABELS + 1, 64)
    elif how == "nan":
        weights[name][0, 0] = float("nan")
    else:
        config = draft / "adapter_config.json"
        config.write_text(config.read_text().replace('"classifier"', "").replace(',\n    "score"', ""))
    save_file(weights, draft / "adapter_model.safetensors")
    engine = make_engine(classifier_dir)
    with pytest.raises(AdapterRefused, match=complaint):
        engine.load_adapter(artifacts / seal(artifacts, draft, base_digest(classifier_dir)))


def test_a_classifier_refuses_to_generate_and_a_generator_to_classify(
    model_dir: Path, classifier_dir: Path, make_engine: EngineMaker
) -> None:
    [done] = make_engine(classifier_dir).generate([[5]], Sampling(seed=0, max_tokens=1))
    assert (done.finished.reason, done.finished.code) == ("error", "unsupported")
    with pytest.raises(PoolFailed, match="head") as failed:
        make_engine(model_dir).embed([[5]], "classify")
    assert failed.value.finished.code == "unsupported"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": []}, "invalid_request"),
        ({"prompt": [5] * 513}, "prompt_too_long"),
        ({"prompt": [160]}, "invalid_request"),
        ({"prompt": [5], "adapter": "a" * 64}, "adapter_not_loaded"),
    ],
)
def test_what_cannot_be_pooled_is_refused_with_its_code(
    fields: dict[str, Any], code: str, model_dir: Path, make_engine: EngineMaker
) -> None:
    core = make_engine(model_dir).core
    core.submit_pool(b"c", Pool(id="a", **fields))
    [(_, ending)] = core.outbox
    assert (ending.reason, ending.code) == ("error", code)
    assert not core.busy


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    directory = tmp_path_factory.mktemp("mixtral")
    MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)).save_pretrained(directory)
    return directory


def adapt_mixtral(directory: Path, **options: object) -> PeftModel:
    base = MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, **options))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def test_attention_adapters_serve_on_a_mixture_of_experts(
    mixtral_dir: Path, artifacts: Path, make_engine: EngineMaker
) -> None:
    adapted = adapt_mixtral(mixtral_dir, target_modules=["q_proj", "v_proj", "o_proj"])
    engine = make_engine(mixtral_dir)
    digest = engine.load_adapter(artifacts / write_artifact(artifacts, base_digest(mixtral_dir), adapted))
    token_ids = list(range(10, 60))
    expected = reference_logits(adapted.merge_and_unload(), token_ids)
    assert (engine.logits(token_ids, digest) - expected).abs().max() < 1e-4
    assert (engine.logits(token_ids) - expected).abs().max() > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "gate"]},
    ],
)
def test_adapters_on_experts_are_refused_clearly(
    options: dict[str, Any], mixtral_dir: Path, artifacts: Path, make_engine: EngineMaker
) -> None:
    adapted = adapt_mixtral(mixtral_dir, **options)
    digest = write_artifact(artifacts, base_digest(mixtral_dir), adapted)
    with pytest.raises(AdapterRefused, match="mixture-of-experts"):
        make_engine(mixtral_dir).load_adapter(artifacts / digest)


def test_an_offline_encoder_embeds_and_has_no_core(tmp_path: Path, make_engine: EngineMaker) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=160, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    engine: LocalEngine = make_engine(tmp_path)
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([p])).last_hidden_state[0].mean(dim=0) for p in PROMPTS])
    assert (engine.embed(PROMPTS) - expected).abs().max() < 1e-4
    with pytest.raises(UnsupportedModel, match="encoder"):
        engine.generate([[5]], Sampling(seed=0, max_tokens=1))
