"""transformers is the oracle: fp32 logits equal within 1e-4, however the tokens are cut into steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.layers.linear import Linear, packing_works
from engine.models.registry import read_spec
from engine.models.spec import UnsupportedModel
from tests.engine.conftest import EngineMaker, ModelMaker, reference, reference_logits
from tests.engine.families import CASES, LLAMA3, write_model
from tests.engine.forwarding import Forwarding

# Llama alone, through the whole engine; tests/engine/test_families.py has the other architectures.
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head": {"num_key_value_heads": 4},
    "one_kv_head_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 32},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "llama3_rope": {"rope_parameters": LLAMA3},
}
CUTS = {"prefill": [70], "chunked": [16, 1, 30, 23], "decode": [60] + [1] * 10, "verify": [50, 5, 1, 8, 6]}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_however_the_tokens_are_cut(
    name: str, make_model: ModelMaker, make_engine: EngineMaker
) -> None:
    directory = make_model(seed=len(name), **CONFIGS[name])
    token_ids = torch.randint(0, 160, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference_logits(reference(directory), token_ids)
    engine = make_engine(directory)
    for cut, chunks in CUTS.items():
        found = engine.logits(token_ids, chunks=chunks)
        assert (found - expected).abs().max() < 1e-4, cut


def test_plain_linear_gives_the_packed_ones_logits(model_dir: Path, make_engine: EngineMaker) -> None:
    if not packing_works(torch.float32):
        pytest.skip("this CPU has no packed oneDNN linear")
    token_ids = list(range(5, 60))
    packed = make_engine(model_dir, native=False, pack=True).logits(token_ids)
    plain = make_engine(model_dir, native=False, pack=False).logits(token_ids)
    assert (packed - plain).abs().max() < 1e-4


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_equals_the_plain_one(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(rows, 32, generator=generator).to(dtype)
    packed, plain = Linear(weight, bias)(x), Linear(weight, bias, pack=False)(x)
    assert packed.shape == plain.shape == (rows, 48)
    assert torch.allclose(packed.float(), plain.float(), atol=1e-5 if dtype == torch.float32 else 0.13)


def test_sharded_weights_load_like_single_ones(make_model: ModelMaker, make_engine: EngineMaker) -> None:
    single, sharded = make_model(seed=3), make_model(seed=3, shards="60KB")
    assert (sharded / "model.safetensors.index.json").exists()
    token_ids = list(range(4, 30))
    assert torch.equal(make_engine(single).logits(token_ids), make_engine(sharded).logits(token_ids))


def test_bf16_stays_close_to_fp32(model_dir: Path, make_engine: EngineMaker) -> None:
    token_ids = list(range(7, 90))
    exact = make_engine(model_dir).logits(token_ids).log_softmax(-1)
    rounded = make_engine(model_dir, precision="bf16").logits(token_ids).log_softmax(-1)
    assert (exact - rounded).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "supported: LlamaForCausalLM, .*Qwen3MoeForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
        ({"architectures": None}, "is not supported"),
        ({"hidden_act": "gelu"}, "supported: silu"),
        ({"hidden_act": "gelu_new"}, "supported: silu"),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 2.0}}, "supported: default, linear, dynamic, llama3"),
        ({"quantization_config": {"bits": 4}}, "use the bf16 or fp32 weights"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"vocab_size": 0}, "positive integer"),
    ],
)
def test_unsupported_models_are_refused_by_name(
    change: dict[str, Any], complaint: str, model_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel, match=complaint):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "not understood"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}), "config.json says"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], object],
    complaint: str,
    model_dir: Path,
    tmp_path: Path,
    make_engine: EngineMaker,
) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(UnsupportedModel, match=complaint):
        make_engine(tmp_path)


@pytest.mark.parametrize(
    ("name", "edit", "complaint"),
    [
        (
            "mixtral",
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
            "experts.3.w2.weight is missing",
        ),
        (
            "mixtral",
            lambda tensors: tensors.update(
                {"model.layers.1.block_sparse_moe.experts.5.w1.weight": torch.ones(112, 64)}
            ),
            "not understood: model.layers.1.block_sparse_moe.experts.5",
        ),
        (
            "qwen3_moe_fused_windowed",
            lambda tensors: tensors.update({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(6, 64, 80)}),
            "config.json says",
        ),
        ("qwen3_moe", lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight"), "mlp.gate.weight is missing"),
        ("qwen3", lambda tensors: tensors.pop("model.layers.0.self_attn.k_norm.weight"), "k_norm.weight is missing"),
        ("qwen2", lambda tensors: tensors.pop("model.layers.0.self_attn.v_proj.bias"), "v_proj.bias is missing"),
        ("llama_classifier", lambda tensors: tensors.pop("score.weight"), "score.weight is missing"),
        ("llama_classifier", lambda tensors: tensors.update({"score.weight": torch.ones(3, 64)}), "config.json says"),
        ("llama", lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(torch.int8)}), "torch.int8"),
    ],
)
def test_weights_of_every_family_must_be_whole(
    name: str, edit: Callable[[dict[str, torch.Tensor]], object], complaint: str, tmp_path: Path
) -> None:
    write_model(tmp_path, CASES[name])
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=complaint):
        Forwarding(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", "not a readable index"),
        ("[]", "not a readable index"),
        ('{"weight_map": {}}', "names no weight files"),
        ('{"weight_map": {"model.norm.weight": 3}}', "names no weight files"),
        ('{"weight_map": {"model.norm.weight": "../other/model.safetensors"}}', "outside its directory"),
        ('{"weight_map": {"model.norm.weight": "absent.safetensors"}}', "not a readable safetensors file"),
    ],
)
def test_a_broken_shard_index_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    write_model(tmp_path, CASES["llama"])
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=complaint):
        Forwarding(tmp_path)


def test_a_pickled_checkpoint_is_not_read(model_dir: Path, tmp_path: Path, make_engine: EngineMaker) -> None:
    torch.save({"model.norm.weight": torch.ones(64)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(UnsupportedModel, match="no safetensors weights"):
        make_engine(tmp_path)
