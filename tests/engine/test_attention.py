"""The gathering backend against a fp32 reference that goes head by head."""

import numpy as np
import pytest
import torch

from engine.layers import attention as module
from engine.layers.attention import GatherAttention, Span, grouped, reference_attention, windowed
from engine.memory.cache import KVCache
from engine.models.spec import DecoderSpec, RopeSpec

# Tokens seen by layer: all, fewer than a page, a few pages, more than any row has.
WINDOWS = (0, 5, 37, 300)
SPEC = DecoderSpec(
    architecture="LlamaForCausalLM",
    vocab_size=8,
    hidden_size=96,
    intermediate_size=8,
    layers=len(WINDOWS),
    heads=6,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    max_positions=512,
    rope=RopeSpec("default", 10000.0),
    tied=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows=WINDOWS,
)
CPU = torch.device("cpu")
# (cached tokens, new tokens): single tokens at several lengths, chunks, a fresh prompt, verify rows.
ROWS = [(0, 1), (15, 1), (16, 1), (200, 1), (30, 5), (31, 5), (0, 40), (17, 33)]


def filled_cache(dtype: torch.dtype) -> tuple[KVCache, list[Span], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Rows with shuffled pages, the same in all layers; also each row's keys and values in order."""
    cache = KVCache(SPEC, 128, 16, dtype, CPU)
    order = np.random.default_rng(0).permutation(np.arange(1, 129))
    generator = torch.Generator().manual_seed(0)
    spans, contents, offset = [], [], 0
    for start, fresh in ROWS:
        tokens = start + fresh
        blocks = -(-tokens // 16)
        table = np.zeros(32, dtype=np.int64)
        table[:blocks], order = order[:blocks], order[blocks:]
        spans.append(Span(offset, start, fresh, table))
        offset += fresh
        kv = torch.randn(tokens, 4, 16, generator=generator).to(dtype)
        places = np.arange(tokens)
        slots = torch.from_numpy(table[places // 16] * 16 + places % 16)
        for layer in range(SPEC.layers):
            cache.write(layer, kv, cache.write_index(slots))
        contents.append((kv[:, :2], kv[:, 2:]))
    return cache, spans, contents


@pytest.mark.parametrize("layer", range(len(WINDOWS)))
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_ragged_rows_attend_like_the_reference(
    dtype: torch.dtype, tolerance: float, streamed: bool, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(module, "SCORE_ELEMENTS", 0)
    cache, spans, contents = filled_cache(dtype)
    attention = GatherAttention(SPEC, cache, CPU, dtype)
    q = torch.randn(sum(fresh for _, fresh in ROWS), 6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = attention(layer, q, attention.plan(spans))
    for span, (keys, values) in zip(spans, contents, strict=True):
        rows = slice(span.offset, span.offset + span.fresh)
        expected = reference_attention(q[rows], keys, values, span.start, WINDOWS[layer])
        assert (found[rows].float() - expected).abs().max() < tolerance, span


def test_a_window_of_one_sees_only_the_token_itself() -> None:
    values = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(2))
    found = reference_attention(torch.ones(3, 2, 16), torch.ones(9, 2, 16), values, start=4, window=1)
    assert torch.allclose(found, values[4:7].reshape(3, 32))


@pytest.mark.parametrize(
    ("start", "window", "pages_left", "start_left"),
    # The first token at `start` sees the places start - window + 1 .. start.
    [
        (46, 16, [2, 3, 4], 30),
        (47, 16, [3, 4], 15),
        (48, 16, [3, 4], 16),
        (63, 16, [4], 15),
        (15, 99, [1, 2, 3, 4], 15),
        (0, 1, [1, 2, 3, 4], 0),
    ],
)
def test_pages_wholly_before_the_window_are_not_gathered(
    start: int, window: int, pages_left: list[int], start_left: int
) -> None:
    table = np.array([1, 2, 3, 4], dtype=np.int64)
    found = windowed(Span(7, start, 3, table), window, 16)
    assert (found.table.tolist(), found.start, found.fresh, found.offset) == (pages_left, start_left, 3, 7)


def test_windowed_buckets_gather_no_more_pages_than_the_window_needs() -> None:
    cache, _, _ = filled_cache(torch.float32)
    attention = GatherAttention(SPEC, cache, CPU, torch.float32)
    plan = attention.plan([Span(0, 500, 1, np.arange(1, 33, dtype=np.int64))])
    lanes = 2 * SPEC.kv_heads
    assert {window: buckets[0].pages.numel() // lanes for window, buckets in plan.items()} == {
        0: 32,
        5: 1,
        37: 3,
        300: 20,
    }


def test_rows_that_do_not_lie_next_to_each_other_share_a_bucket() -> None:
    table = np.zeros(4, dtype=np.int64)
    spans = [Span(0, 40, 1, table), Span(1, 0, 7, table), Span(8, 41, 1, table)]
    assert [[span.offset for span in group] for group in grouped(spans)] == [[1], [0, 8]]


def test_rows_of_very_different_length_do_not_pad_each_other() -> None:
    table = np.zeros(4, dtype=np.int64)
    spans = [Span(0, 4000, 1, table), Span(1, 10, 1, table), Span(2, 12, 1, table)]
    assert [[span.offset for span in group] for group in grouped(spans)] == [[0], [1, 2]]
