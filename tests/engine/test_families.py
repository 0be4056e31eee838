"""Every architecture against transformers, and against itself however its tokens are cut and whoever is beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.messages import Sampling
from engine.models.registry import SUPPORTED, read_spec
from engine.models.spec import UnsupportedModel
from engine.runner.placement import parameters
from tests.engine.conftest import EngineMaker
from tests.engine.families import CASES, LONGROPE, ROPES, SHAPE, YARN, Case, expected, some_tokens, write_model
from tests.engine.forwarding import Forwarding

CUTS = {"prefill": [70], "chunked": [16, 1, 30, 23], "decode": [60] + [1] * 10, "verify": [50, 5, 1, 8, 6]}
LONGEST_CUT = 40


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_equals_transformers_however_its_tokens_are_cut(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, CASES[name], seed=len(name))
    token_ids = some_tokens(70)
    wanted = expected(model, token_ids)
    forwarding = Forwarding(tmp_path)
    for cut, chunks in CUTS.items():
        assert (forwarding.alone(token_ids, chunks) - wanted).abs().max() < 1e-4, cut


@pytest.mark.parametrize("name", CASES)
def test_the_engine_serves_every_architecture_as_transformers_computes_it(
    name: str, tmp_path: Path, make_engine: EngineMaker
) -> None:
    model = write_model(tmp_path, CASES[name], seed=1 + len(name))
    token_ids = some_tokens(60)
    engine = make_engine(tmp_path)
    states = engine.hidden_states(token_ids, chunks=[33, 1, 1, 7, 18])
    head = model.score if hasattr(model, "score") else model.lm_head
    assert (head(states.float()) - expected(model, token_ids)).abs().max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_text_is_the_same_in_chunks_of_every_size_and_in_a_crowd(name: str, tmp_path: Path) -> None:
    write_model(tmp_path, CASES[name], seed=2)
    forwarding = Forwarding(tmp_path)
    token_ids = some_tokens(LONGEST_CUT)
    wanted = forwarding.alone(token_ids, [LONGEST_CUT])
    for size in range(1, LONGEST_CUT):
        chunks = [size] * (LONGEST_CUT // size) + ([LONGEST_CUT % size] if LONGEST_CUT % size else [])
        assert (forwarding.alone(token_ids, chunks) - wanted).abs().max() < 1e-5, size
    crowd = [forwarding.start(some_tokens(LONGEST_CUT + 20, seed)) for seed in range(2, 9)]
    text = forwarding.start(token_ids)
    for index, fresh in enumerate([9, 1, 1, 14, 5, 1, 9]):
        beside = [(other, 1 + (index * place) % 8) for place, other in enumerate(crowd)]
        forwarding.advance([*beside[:3], (text, fresh), *beside[3:]])
    assert (forwarding.output(text) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ROPES)
def test_every_rope_scaling_equals_transformers(name: str, tmp_path: Path) -> None:
    case = Case("LlamaForCausalLM", {"rope_parameters": ROPES[name], "num_hidden_layers": 2})
    model = write_model(tmp_path, case, seed=3)
    token_ids = some_tokens(120)
    found = Forwarding(tmp_path).alone(token_ids, [100, 1, 19])
    assert (found - expected(model, token_ids)).abs().max() < 1e-4


def test_rope_settings_are_read_as_they_were_written_before_transformers_5(tmp_path: Path) -> None:
    write_model(tmp_path, Case("Qwen2ForCausalLM", {"rope_parameters": YARN | {"rope_theta": 5000.0}}))
    today = read_spec(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": scaling}))
    assert read_spec(tmp_path) == today


def test_windowed_layers_are_counted_from_the_first_where_no_types_are_given(tmp_path: Path) -> None:
    write_model(tmp_path, CASES["qwen2_later_layers_windowed"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(tmp_path).windows == (0, 20, 20)


def test_a_window_no_context_outgrows_is_none(tmp_path: Path) -> None:
    write_model(tmp_path, Case("MistralForCausalLM", {"sliding_window": 512}))
    assert read_spec(tmp_path).windows == (0, 0, 0)


def test_longrope_ends_where_its_other_frequencies_would_begin(tmp_path: Path) -> None:
    write_model(tmp_path, Case("LlamaForCausalLM", {"rope_parameters": LONGROPE}))
    assert read_spec(tmp_path).max_positions == 128


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_missing_keys_mean_what_they_mean_to_transformers(architecture: str, tmp_path: Path) -> None:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: SHAPE[name] for name in required} | {"num_attention_heads": 32, "hidden_size": 256}
    whole = getattr(transformers, f"{architecture.split('For')[0]}Config")(**sizes)
    (tmp_path / "config.json").write_text(json.dumps(whole.to_dict() | {"architectures": [architecture]}))
    told = read_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"architectures": [architecture]}))
    assert read_spec(tmp_path) == told


@pytest.mark.parametrize("name", ["llama", "llama_one_kv_head_tied", "qwen3_moe", "mixtral"])
def test_a_models_size_is_known_before_it_is_loaded(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, CASES[name])
    # The estimate leaves norms and routers out.
    assert parameters(read_spec(tmp_path)) == pytest.approx(model.num_parameters(), rel=0.02)


def test_a_classifier_has_labels_and_scores_and_no_lm_head(tmp_path: Path) -> None:
    model = write_model(tmp_path, CASES["mistral_classifier"])
    decoder = Forwarding(tmp_path).decoder
    assert decoder.spec.labels == ("no", "yes")
    assert decoder.head is None
    assert decoder.score is not None
    assert torch.equal(decoder.score, model.score.weight)


def test_a_classifier_is_not_asked_for_text(tmp_path: Path, make_engine: EngineMaker) -> None:
    write_model(tmp_path, CASES["qwen2_classifier"])
    answer = make_engine(tmp_path).generate([some_tokens(5)], Sampling(temperature=0.0, seed=0, max_tokens=3))[0]
    assert answer.token_ids == []
    assert (answer.finished.reason, answer.finished.code) == ("error", "unsupported")


def test_unnamed_labels_are_numbered_as_transformers_does(tmp_path: Path) -> None:
    write_model(tmp_path, CASES["llama_classifier"])
    assert read_spec(tmp_path).labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("qwen3_layer_types", {"use_sliding_window": False}, "use_sliding_window is off"),
        ("qwen3_layer_types", {"layer_types": ["full_attention"]}, "names 1 layers"),
        ("qwen3_layer_types", {"layer_types": ["chunked_attention"] * 3}, "supported: full_attention"),
        ("qwen3_layer_types", {"layer_types": "full"}, "list of str"),
        ("mistral_window", {"sliding_window": -1}, "sliding_window must be a positive integer"),
        ("mixtral", {"num_experts_per_tok": 6}, "cannot be chosen"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "list of int"),
        ("qwen2_classifier", {"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ("llama", {"head_dim": 15}, "must be even"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "supported: default, linear"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor must be a positive number"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial rotary"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ("llama", {"rope_parameters": {**LONGROPE, "short_factor": [1.0]}}, "list of 8"),
        ("llama", {"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
    ],
)
def test_configurations_out_of_reach_are_refused_by_name(
    name: str, change: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    write_model(tmp_path, CASES[name])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel, match=complaint):
        read_spec(tmp_path)


def test_the_readme_lists_every_architecture() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Models the engine runs")[1].split("\n## ")[0]
    assert [name for name in SUPPORTED if f"`{name}`" not in section] == []
