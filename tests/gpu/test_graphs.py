"""Captured graphs against the eager forward, on the same kernels, with adapters coming and going."""

import numpy as np
import pytest
import torch
from torch.nn.attention.varlen import varlen_attn_out

from engine.layers.varlen import VarlenAttention, agree
from engine.scheduling.scheduler import Row
from tests.engine.conftest import ModelMaker
from tests.engine.graph_world import LONGEST, World

# bf16 has 8 bits of mantissa; hidden states of the tiny model are of order 1.
TOLERANCE = 0.05


@pytest.fixture
def world(make_model: ModelMaker) -> World:
    """bf16 on the GPU, with the calling convention the installed kernel takes."""
    made = World(make_model(), kernel=varlen_attn_out, block=256, windows=(0, 9), dtype=torch.bfloat16, device="cuda")
    try:
        agreeing = agree(made.varlen, made.gather, made.decoder.spec, made.cache, made.device)
    except RuntimeError:
        agreeing = False
    if not agreeing:
        made.varlen = VarlenAttention(made.decoder.spec, made.cache, made.device, key_offsets=False)
        assert agree(made.varlen, made.gather, made.decoder.spec, made.cache, made.device)
    return made


@pytest.mark.parametrize(
    ("shapes", "fresh"),
    [
        ([(5, 1, 0)], (1,)),
        ([(5, 1, 1), (40, 1, 0), (16, 1, 2), (31, 1, 2), (70, 1, 5)], (1,)),
        ([(5, 3, 0), (40, 3, 4), (16, 3, 1)], (1, 3)),
        ([(5, 1, 2), (40, 3, 0), (16, 2, 1), (0, 2, 0)], (1, 4)),
    ],
    ids=["one", "adapters", "verify", "ragged"],
)
def test_a_replay_gives_what_the_eager_forward_gives(
    world: World, shapes: list[tuple[int, int, int]], fresh: tuple[int, ...]
) -> None:
    rows = world.prefilled(shapes)
    graphed = world.graphed(8, fresh)
    graphed.warm_up()
    expected = world.eager(rows, world.varlen).clone()
    found = graphed.states(rows).clone()
    assert (found.float() - expected.float()).abs().max() < TOLERANCE
    assert torch.equal(found, graphed.states(rows)), "a replay changed what the next one computes"


def test_adapters_swapped_between_replays_answer_at_once(world: World) -> None:
    rows = world.prefilled([(5, 1, 1), (40, 1, 0)])
    graphed = world.graphed(4, (1,))
    first = graphed.states(rows).clone()
    world.install(1, seed=99)
    second = graphed.states(rows).clone()
    assert (second.float() - world.eager(rows, world.varlen).float()).abs().max() < TOLERANCE
    assert (first[0].float() - second[0].float()).abs().max() > TOLERANCE
    assert torch.equal(first[1], second[1])


def test_a_thousand_random_steps_through_every_tier_stay_right(world: World) -> None:
    graphed = world.graphed(8, (1, 4))
    graphed.warm_up()
    dice = np.random.default_rng(0)
    rows = world.prefilled([(int(dice.integers(0, LONGEST - 4)), 4, int(dice.integers(0, 6))) for _ in range(8)])
    for step in range(1000):
        chosen = [
            Row(rows[index].sequence, int(dice.integers(1, 5))) for index in dice.permutation(8)[: dice.integers(1, 9)]
        ]
        found = graphed.states(chosen).clone()
        if step % 50 == 0:
            assert (found.float() - world.eager(chosen, world.varlen).float()).abs().max() < TOLERANCE
    assert all(pages.isfinite().all() for layer in range(2) for pages in world.cache.paged(layer))
