"""What of CUDA graphs needs no GPU: tiers, padding, static buffers, LoRA in fixed shapes, the paged kernel's arguments.

The eager twin of a graph must give what an unpadded forward gives.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import core
from engine.config import EngineConfig
from engine.layers.attention import Span
from engine.layers.backends import choose_attention
from engine.layers.lora import LoraBatch, LoraWeights, lora_batch
from engine.layers.varlen import VarlenAttention, agree, reference_kernel
from engine.memory.cache import KVCache
from engine.messages import Sampling
from engine.models.decoder import Decoder
from engine.models.spec import DecoderSpec, MoeSpec
from engine.runner.graphs import Compute, GraphedForward, Replay, capturable
from engine.runner.placement import block_size
from engine.runner.tiers import Piece, Tier, all_tiers, choose_tier, key_tiers, padded, row_tiers
from tests.engine.conftest import EngineMaker, ModelMaker
from tests.engine.graph_world import World

CPU = torch.device("cpu")
BLOCK = 16


def piece(start: int, fresh: int, slot: int = 0, first_block: int = 1) -> Piece:
    blocks = -(-(start + fresh) // BLOCK)
    table = np.zeros(max(8, blocks), dtype=np.int64)
    table[:blocks] = range(first_block, first_block + blocks)
    return Piece(list(range(100, 100 + fresh)), start, table, slot)


def test_tiers_reach_exactly_the_most_rows_and_the_longest_context() -> None:
    assert row_tiers(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert row_tiers(1) == [1]
    assert row_tiers(20) == [1, 2, 4, 8, 16, 20]
    assert row_tiers(300) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300]
    assert key_tiers(40_000, 256) == [2048, 16_384, 40_192]
    assert key_tiers(300, 256) == [512]


def test_the_largest_tier_is_captured_first() -> None:
    tiers = all_tiers(4, (1, 3), 3000, 256, lora=True)
    assert tiers[0] == Tier(4, 3, 3072, True)
    assert len(set(tiers)) == len(tiers) == 3 * 2 * 2 * 2
    assert [tier.tokens for tier in tiers] == sorted((tier.tokens for tier in tiers), reverse=True)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([piece(9, 1)], Tier(1, 1, 2048, False)),
        ([piece(9, 1)] * 3, Tier(4, 1, 2048, False)),
        ([piece(9, 1), piece(9, 1, slot=2)], Tier(2, 1, 2048, True)),
        ([piece(9, 1), piece(9, 2)], Tier(2, 3, 2048, False)),
        ([piece(2047, 1)], Tier(1, 1, 2048, False)),
        ([piece(2048, 1)], Tier(1, 1, 3072, False)),
        ([piece(9, 4)], None),
        ([piece(9, 1)] * 5, None),
        ([piece(3072, 1)], None),
    ],
)
def test_a_step_takes_the_smallest_tier_that_holds_it(pieces: list[Piece], expected: Tier | None) -> None:
    assert choose_tier(all_tiers(4, (1, 3), 3000, 256, lora=True), pieces) == expected


def test_padding_rows_write_and_read_only_the_null_block() -> None:
    numbers = padded([piece(20, 2, slot=3, first_block=5)], Tier(3, 2, 64, True), BLOCK)
    assert numbers.wide_4T.tolist() == [
        [100, 101, 0, 0, 0, 0],
        [20, 21, 0, 1, 0, 1],
        [6 * BLOCK + 4, 6 * BLOCK + 5, 0, 1, 0, 1],
        [3, 3, 0, 0, 0, 0],
    ]
    queries, keys, offsets, tables = np.split(numbers.narrow, [4, 7, 11])
    assert queries.tolist() == [0, 2, 4, 6]
    assert keys.tolist() == [22, 2, 2]
    assert offsets.tolist() == [0, 22, 24, 26]
    assert tables.reshape(3, -1).tolist() == [[5, 6, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_tokens_left_over_by_short_rows_belong_to_no_row() -> None:
    numbers = padded([piece(20, 1), piece(3, 2)], Tier(2, 2, 64, False), BLOCK)
    assert numbers.narrow[:3].tolist() == [0, 1, 3]
    assert numbers.wide_4T[:, 3].tolist() == [0, 0, 0, 0]


def test_a_table_wider_than_the_tier_is_cut_to_what_the_tier_reads() -> None:
    numbers = padded([piece(20, 1, first_block=5)], Tier(1, 1, 32, False), BLOCK)
    assert numbers.narrow[5:].tolist() == [5, 6]


@pytest.fixture
def world(make_model: ModelMaker) -> World:
    return World(make_model(), kernel=reference_kernel, block=BLOCK)


def twin(world: World, rows: int, fresh: tuple[int, ...]) -> GraphedForward:
    """The eager twin of captured graphs: the same buffers and the same forward, run instead of replayed."""
    return world.graphed(rows, fresh, record=lambda compute: compute)


@pytest.mark.parametrize(
    ("shapes", "fresh"),
    [
        ([(5, 1, 0)], (1,)),
        ([(5, 1, 0), (40, 1, 0), (16, 1, 0)], (1,)),
        ([(5, 1, 1), (40, 1, 0), (16, 1, 2), (31, 1, 2), (70, 1, 5)], (1,)),
        ([(5, 3, 0), (40, 3, 4), (16, 3, 1)], (1, 3)),
        ([(5, 1, 2), (40, 3, 0), (16, 2, 1), (0, 2, 0)], (1, 4)),
    ],
    ids=["one", "three", "adapters", "verify", "ragged"],
)
def test_a_padded_replay_gives_what_an_unpadded_forward_gives(
    world: World, shapes: list[tuple[int, int, int]], fresh: tuple[int, ...]
) -> None:
    rows = world.prefilled(shapes)
    graphed = twin(world, 8, fresh)
    expected = world.eager(rows).clone()
    found = graphed.states(rows)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, graphed.states(rows)), "a second replay over what the first left behind differs"


def test_layers_with_sliding_windows_replay_like_the_unpadded_forward(make_model: ModelMaker) -> None:
    world = World(make_model(), kernel=reference_kernel, block=BLOCK, windows=(0, 9))
    assert agree(world.varlen, world.gather, world.decoder.spec, world.cache, CPU)
    rows = world.prefilled([(5, 1, 2), (40, 3, 0), (16, 2, 1), (9, 1, 0)])
    expected = world.eager(rows).clone()
    assert torch.allclose(twin(world, 4, (1, 4)).states(rows), expected, atol=1e-5, rtol=1e-5)


def test_a_padded_replay_writes_the_same_keys_and_values_and_nothing_else(world: World) -> None:
    rows = world.prefilled([(5, 1, 1), (40, 1, 0), (16, 1, 2)])
    graphed = twin(world, 8, (1,))
    graphed.warm_up()
    before = [world.cache.paged(layer) for layer in range(2)]
    kept = [(keys[1:].clone(), values[1:].clone()) for keys, values in before]
    world.eager(rows)
    wanted = [(keys[1:].clone(), values[1:].clone()) for keys, values in before]
    for (keys, values), (old_keys, old_values) in zip(before, kept, strict=True):
        keys[1:], values[1:] = old_keys, old_values
    graphed.states(rows)
    for (keys, values), (want_keys, want_values), (old_keys, _) in zip(before, wanted, kept, strict=True):
        assert torch.allclose(keys[1:], want_keys, atol=1e-5)
        assert torch.allclose(values[1:], want_values, atol=1e-5)
        assert not torch.allclose(keys[1:], old_keys, atol=1e-2)


def test_an_adapter_swapped_between_replays_is_the_one_that_answers(world: World) -> None:
    rows = world.prefilled([(5, 1, 1), (40, 1, 0)])
    graphed = twin(world, 4, (1,))
    first = graphed.states(rows).clone()
    world.install(1, seed=99)
    second = graphed.states(rows).clone()
    assert torch.allclose(second, world.eager(rows), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[0], second[0], atol=1e-2)
    assert torch.allclose(first[1], second[1], atol=1e-6)


def test_a_step_no_tier_holds_is_computed_eagerly(world: World) -> None:
    rows = world.prefilled([(0, 40, 0), (5, 1, 1)])
    graphed = GraphedForward(
        world.decoder, world.cache, world.varlen, rows=4, longest=128, record=lambda compute: compute
    )
    with torch.inference_mode():
        assert torch.allclose(graphed.states(rows), world.eager(rows), atol=1e-5, rtol=1e-5)


def test_an_engine_that_replays_gives_the_tokens_of_one_that_does_not(
    make_model: ModelMaker, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, replays = make_model(), []
    prompts = [[1, *range(10, 10 + length)] for length in (3, 40, 17, 30, 5)]
    sampling = Sampling(temperature=0.8, seed=7, max_tokens=12)
    expected = make_engine(directory).generate(prompts, sampling)

    def counted(compute: Compute) -> Replay:
        return lambda: replays.append(compute) or compute()

    def build(config: EngineConfig, spec: DecoderSpec, *, blocks: int, positions: int) -> GraphedForward:
        decoder = Decoder(spec, config.model, dtype=torch.float32, device=CPU, positions=positions)
        cache = KVCache(spec, blocks, block_size(CPU), torch.float32, CPU)
        attention = VarlenAttention(spec, cache, CPU, kernel=reference_kernel)
        return GraphedForward(decoder, cache, attention, rows=3, longest=positions, record=counted)

    monkeypatch.setattr(core, "build_forward", build)
    found = make_engine(directory, max_running=3).generate(prompts, sampling)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert len(replays) > 12


def test_models_with_experts_are_not_captured(world: World) -> None:
    assert capturable(world.decoder.spec)
    assert not capturable(replace(world.decoder.spec, moe=MoeSpec(4, 2, 32, True)))


def test_padding_leaves_no_trace_in_later_steps(world: World) -> None:
    rows = world.prefilled([(5, 1, 0), (40, 1, 3)])
    graphed = twin(world, 8, (1, 4))
    expected = graphed.states(rows[:1]).clone()
    graphed.states(world.prefilled([(11, 4, 2), (30, 2, 1), (2, 1, 5)]))
    world.cache.paged(0)[0][0] = 1e4
    assert torch.equal(graphed.states(rows[:1]), expected)


def test_tokens_of_no_row_never_carry_what_the_memory_held_into_the_null_block(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = world.prefilled([(5, 1, 2), (40, 3, 0)])
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, torch.nan, **options))
    assert twin(world, 2, (4,)).states(rows).isfinite().all()
    assert all(pages.isfinite().all() for layer in range(2) for pages in world.cache.paged(layer))


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_lora_in_fixed_shapes_equals_lora_by_runs(tokens: int) -> None:
    weights = LoraWeights(9, 6, 24, 40, torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    for slot in range(1, 9):
        used = 2 + slot % 5
        weights.fill(slot, torch.randn(used, 24, generator=generator), torch.randn(used, 40, generator=generator))
    slots = [0, 3, 8, 3, 1, 0, 5][:tokens] if tokens > 1 else [8]
    x_TI, out_TO = torch.randn(tokens, 24, generator=generator), torch.randn(tokens, 40, generator=generator)
    found, expected = out_TO.clone(), out_TO.clone()
    weights.add_(found, x_TI, LoraBatch((), torch.tensor(slots), static=True))
    batch = lora_batch(slots, [1] * tokens, CPU)
    assert batch is not None
    weights.add_(expected, x_TI, batch)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, out_TO, atol=1e-2)


def test_a_foreign_adapter_that_overflows_does_not_spoil_other_rows() -> None:
    weights = LoraWeights(3, 2, 8, 8, torch.float32, CPU)
    weights.fill(1, torch.full((2, 8), 3e38), torch.ones(2, 8))
    weights.fill(2, torch.ones(2, 8), torch.ones(2, 8))
    out_TO = torch.zeros(3, 8)
    weights.add_(out_TO, torch.ones(3, 8), LoraBatch((), torch.tensor([2, 0, 1]), static=True))
    assert out_TO[:2].tolist() == [[16.0] * 8, [0.0] * 8]
    assert out_TO[2].isinf().all()


def test_the_paged_kernels_arguments_mean_what_gathering_means(world: World) -> None:
    assert agree(world.varlen, world.gather, world.decoder.spec, world.cache, CPU)


def test_a_cache_too_small_for_the_start_up_check_is_refused_in_words(world: World) -> None:
    cache = KVCache(world.decoder.spec, 1, 256, torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="--kv-tokens must be at least 512"):
        choose_attention(world.decoder.spec, cache, torch.device("cuda"))


@pytest.mark.parametrize("key_offsets", [True, False])
def test_torchs_own_kernel_takes_every_argument(world: World, key_offsets: bool) -> None:
    meta, spec = torch.device("meta"), replace(world.decoder.spec, windows=(0, 9))
    cache = KVCache(spec, 4, 256, torch.bfloat16, meta)
    attention = VarlenAttention(spec, cache, meta, key_offsets=key_offsets)
    plan = attention.plan([Span(0, 40, 1, np.arange(1, 5)), Span(1, 0, 7, np.arange(1, 5))])
    q_THD = torch.empty(8, spec.heads, spec.head_dim, dtype=torch.bfloat16, device=meta)
    with torch.inference_mode():
        assert [attention(layer, q_THD, plan).shape for layer in range(2)] == [(8, spec.attention_size)] * 2


def test_a_kernel_that_ignores_the_causal_mask_is_noticed(world: World) -> None:
    def careless(out_THD: torch.Tensor, *arguments: object, **options: object) -> None:
        reference_kernel(out_THD, *arguments, **{**options, "window_size": (0, 0)})  # type: ignore[arg-type]

    wrong = VarlenAttention(world.decoder.spec, world.cache, CPU, kernel=careless)
    assert not agree(wrong, world.gather, world.decoder.spec, world.cache, CPU)
