"""Steps that only measure: of every size, within what sequences and cache can hold, with nothing left behind."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.memory.blocks import BlockPool
from engine.messages import Generate, Sampling
from engine.scheduling.scheduler import Row
from engine.speculation.rehearsal import rehearsal
from tests.engine.lossless import started


@pytest.mark.parametrize(("positions", "cache"), [(256, 256), (20, 256), (4096, 256), (64, 4096)])
@pytest.mark.parametrize("context", [0, 128, 768, 5000])
def test_made_up_rows_are_never_longer_than_sequences_can_be(positions: int, cache: int, context: int) -> None:
    steps: list[list[Row]] = []
    pool: Any = BlockPool(cache, 16)
    run = rehearsal(SimpleNamespace(step=steps.append), pool, positions)  # type: ignore[arg-type]
    for rows in (1, 4, 64):
        for tokens in (1, 2, 63, 512):
            run(rows, tokens, context)
            made = steps.pop()
            assert sum(row.length for row in made) == tokens
            assert len(made) >= min(rows, tokens)
            for row in made:
                end = row.sequence.computed + row.length
                assert row.samples
                assert end <= min(positions, cache)
                assert len(row.table) >= pool.needed(end)
                assert 1 <= min(row.table) <= max(row.table) <= pool.total
    assert pool.free == pool.total


def test_an_engine_whose_steps_are_larger_than_its_cache_starts_and_answers(model_dir: Path) -> None:
    for native in (True, False):
        with started(model_dir, kv_tokens=256, step_tokens=512, native=native, pack=native) as core:
            core.submit(b"c", Generate(id="a", prompt=[5, 6], sampling=Sampling(seed=0, max_tokens=3)))
            while core.in_flight:
                core.step()
            assert core.scheduler.pool.free == core.scheduler.pool.total
