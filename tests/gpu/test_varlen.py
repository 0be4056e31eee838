"""torch's paged kernel against the fp32 reference that CPU tests hold it to, argument for argument."""

import numpy as np
import pytest
import torch

from engine.layers.attention import Span
from engine.layers.backends import choose_attention
from engine.layers.varlen import VarlenAttention, reference_kernel
from engine.memory.cache import KVCache
from engine.models.spec import DecoderSpec, RopeSpec

BLOCK, BLOCKS = 256, 64
ROPE = RopeSpec("default", 10000.0)
# (cached tokens, new tokens) of each row.
STEPS = {
    "first token": [(0, 1)],
    "single tokens": [(0, 1), (254, 1), (255, 1), (256, 1), (1500, 1)],
    "verify": [(5, 4), (254, 4), (1021, 4)],
    "prompts": [(0, 300), (0, 1), (0, 256)],
    "chunks": [(256, 256), (100, 33), (511, 2)],
    "mixed": [(700, 1), (0, 513), (30, 5), (255, 1)],
    "crowd": [(17 * row, 1) for row in range(48)],
}


def spec_of(heads: int, kv_heads: int, head_dim: int, windows: tuple[int, ...]) -> DecoderSpec:
    """A spec of which only the attention matters."""
    return DecoderSpec(
        architecture="LlamaForCausalLM", vocab_size=8, hidden_size=heads * head_dim, intermediate_size=8,
        layers=len(windows), heads=heads, kv_heads=kv_heads, head_dim=head_dim, norm_eps=1e-6, max_positions=4096,
        rope=ROPE, tied=True, qkv_bias=False, output_bias=False, mlp_bias=False, windows=windows,
    )  # fmt: skip


def fill(cache: KVCache, spec: DecoderSpec) -> None:
    """Random keys and values in every block, the null block included: nobody may let them through a mask."""
    slots = torch.arange((BLOCKS + 1) * BLOCK, device="cuda")
    for layer in range(spec.layers):
        kv = torch.randn(len(slots), 2 * spec.kv_heads, spec.head_dim, device="cuda").to(cache.dtype)
        cache.write(layer, kv, cache.write_index(slots))


def spans_of(rows: list[tuple[int, int]]) -> list[Span]:
    """Rows over shuffled blocks; rows may share blocks, as attention only reads."""
    order = np.random.default_rng(0)
    offsets = np.cumsum([0, *(fresh for _, fresh in rows)]).tolist()
    return [
        Span(offset, start, fresh, order.permutation(np.arange(1, BLOCKS + 1))[:16])
        for offset, (start, fresh) in zip(offsets, rows, strict=False)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 8, 64), (14, 2, 64), (4, 1, 256)])
@pytest.mark.parametrize("step", STEPS)
def test_the_paged_kernel_equals_the_reference(
    step: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    spec = spec_of(heads, kv_heads, head_dim, (0, 100, 256, 1))
    cache, spans = KVCache(spec, BLOCKS, BLOCK, dtype, torch.device("cuda")), spans_of(STEPS[step])
    served = choose_attention(spec, cache, torch.device("cuda"))
    assert isinstance(served, VarlenAttention)
    fill(cache, spec)
    trusted = VarlenAttention(spec, cache, torch.device("cuda"), kernel=reference_kernel)
    q_THD = torch.randn(sum(fresh for _, fresh in STEPS[step]), heads, head_dim, device="cuda").to(dtype)
    for layer in range(spec.layers):
        found, expected = served(layer, q_THD, served.plan(spans)), trusted(layer, q_THD, trusted.plan(spans))
        assert (found.float() - expected.float()).abs().max() < 0.02, f"window {spec.windows[layer]}"


def test_a_row_gets_the_same_bits_alone_and_in_a_crowd() -> None:
    spec = spec_of(32, 8, 128, (0,))
    cache = KVCache(spec, BLOCKS, BLOCK, torch.bfloat16, torch.device("cuda"))
    attention = choose_attention(spec, cache, torch.device("cuda"))
    fill(cache, spec)
    q_THD = torch.randn(48, 32, 128, device="cuda").bfloat16()
    crowd = spans_of(STEPS["crowd"])
    together = attention(0, q_THD, attention.plan(crowd))
    for row in (0, 20, 47):
        alone = attention(0, q_THD[row : row + 1], attention.plan([crowd[row]._replace(offset=0)]))
        assert torch.equal(together[row : row + 1], alone)
