"""The mixture of experts against a loop over tokens, and adapters on a model that has one."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from engine.digest import base_digest
from engine.layers.moe import MoeLayer, reference_moe, route
from engine.models.spec import MoeSpec
from tests.engine.conftest import EngineMaker, write_artifact
from tests.engine.families import CASES, some_tokens, write_model

HIDDEN = 48


def weights(spec: MoeSpec) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Router, gate-and-up and down matrices."""
    generator = torch.Generator().manual_seed(spec.experts)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    wide = spec.intermediate_size
    gate_up = [random(2 * wide, HIDDEN) for _ in range(spec.experts)]
    return random(spec.experts, HIDDEN), gate_up, [random(HIDDEN, wide) for _ in range(spec.experts)]


@pytest.mark.parametrize("way", [{"pack": True}, {"pack": False}, {"stacked": True}], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize(
    "spec", [MoeSpec(4, 1, 24, False), MoeSpec(4, 2, 24, True), MoeSpec(32, 8, 16, False), MoeSpec(3, 3, 24, True)]
)
def test_grouped_experts_equal_a_loop_over_tokens(spec: MoeSpec, tokens: int, way: dict[str, bool]) -> None:
    router, gate_up, down = weights(spec)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    found = MoeLayer(spec, router, gate_up, down, **way)(x)
    assert found.shape == x.shape
    assert torch.allclose(found, reference_moe(x, router, gate_up, down, spec), atol=1e-4)


def test_a_token_gets_the_same_bits_in_any_company() -> None:
    spec = MoeSpec(6, 2, 24, True)
    layer = MoeLayer(spec, *weights(spec))
    if not layer.router.packed:
        pytest.skip("plain linears round differently by batch")
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0))
    together = layer(x)
    assert all(torch.equal(layer(x[token : token + 1])[0], together[token]) for token in range(40))


def test_bf16_routes_in_fp32() -> None:
    weights_TK, _ = route(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16), MoeSpec(3, 2, 8, True))
    assert weights_TK.dtype == torch.float32
    assert weights_TK.sum() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_adapter_on_the_attention_of_a_mixture_equals_peft(
    name: str, tmp_path: Path, artifacts: Path, make_engine: EngineMaker
) -> None:
    directory = tmp_path / "base"
    model = write_model(directory, CASES[name])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    digest = write_artifact(artifacts, base_digest(directory), adapted)
    engine = make_engine(directory)
    engine.load_adapter(artifacts / digest)
    token_ids = some_tokens(40)
    with torch.inference_mode():
        wanted = adapted(torch.tensor([token_ids])).logits[0]
    found = engine.logits(token_ids, adapter=digest, chunks=[30, 1, 9])
    assert (found - wanted).abs().max() < 1e-4
    assert (engine.logits(token_ids) - wanted).abs().max() > 1e-2
