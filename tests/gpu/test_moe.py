"""The mixture of experts on a GPU: grouped products in bf16 against the fp32 loop, eager and captured."""

import torch

from engine.layers.moe import MoeLayer, StackedExperts, reference_moe
from engine.models.spec import MoeSpec

SPEC = MoeSpec(8, 2, 32, True)
HIDDEN = 64


def layer_and_weights() -> tuple[MoeLayer, tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]]:
    """A bf16 layer on the GPU, and the same weights on the CPU."""
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(SPEC.experts, HIDDEN, generator=generator)
    gate_up = [torch.randn(2 * 32, HIDDEN, generator=generator) / 8 for _ in range(SPEC.experts)]
    down = [torch.randn(HIDDEN, 32, generator=generator) / 6 for _ in range(SPEC.experts)]
    there = {"device": "cuda", "dtype": torch.bfloat16}
    layer = MoeLayer(SPEC, router.to(**there), [w.to(**there) for w in gate_up], [w.to(**there) for w in down])
    rounded = [[w.bfloat16() for w in weights] for weights in (gate_up, down)]
    return layer, (router.bfloat16(), rounded[0], rounded[1])


def test_grouped_products_equal_a_loop_over_tokens() -> None:
    layer, weights = layer_and_weights()
    x = torch.randn(37, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = layer(x.cuda()).cpu().float()
    assert isinstance(layer.experts, StackedExperts)
    # A near-tie may send one token elsewhere in bf16; all others agree to its rounding.
    wrong = (found - reference_moe(x, *weights, SPEC)).abs().amax(-1) > 0.1
    assert int(wrong.sum()) <= 1


def test_a_captured_layer_follows_its_input() -> None:
    layer, _ = layer_and_weights()
    x, other = torch.randn(2, 16, HIDDEN, device="cuda", dtype=torch.bfloat16).unbind()
    x = x.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    x.copy_(other)
    graph.replay()
    assert torch.allclose(out, layer(other), atol=1e-2)
