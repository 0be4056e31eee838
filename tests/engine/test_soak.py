"""A long time in a short one: mixed requests, cancels, deadlines and swaps on a real, very small model."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import Done, Finished, Generate, LoadAdapter, Pool, Pooled, Sampling, UnloadAdapter

REQUESTS = 10_000
IN_FLIGHT = 24
# Caches of allocators, and what a step of another shape allocates for the first time.
MOST_GROWTH = 24 << 20


@pytest.fixture
def core(model_dir: Path, artifacts: Path) -> Engine:
    config = EngineConfig(
        model=model_dir, artifacts=artifacts, precision="fp32", device="cpu", threads=1, kv_tokens=512,
        max_running=16, step_tokens=128, adapter_slots=3, adapter_rank=4, suffix_tokens=4096,
    )  # fmt: skip
    core = Engine(config)
    yield core
    core.close()


def ask(core: Engine, number: int, dice: random.Random, digests: list[str]) -> None:
    """One request of any kind."""
    adapter = dice.choice([None, None, *digests])
    shared, name = [dice.choice([5, 6, 7])] * dice.randint(1, 32), str(number)
    prompt = shared + [dice.randrange(4, 160) for _ in range(dice.randint(3, 8))]
    salt, share, urgent = dice.choice(["", "", "s"]), dice.choice("xyz"), dice.random() < 0.7
    priority = "interactive" if urgent else "batch"
    if dice.random() < 0.1:
        how = dice.choice(["last", "mean", "first"])
        core.submit_pool(b"c", Pool(id=name, prompt=prompt, how=how, adapter=adapter, cache_salt=salt, share=share))
        return
    sampling = Sampling(
        temperature=dice.choice([0.0, 1.0]), top_p=dice.choice([1.0, 0.9]), seed=number, max_tokens=dice.randint(1, 12),
        presence_penalty=dice.choice([0.0, 0.0, 0.5]), top_logprobs=dice.choice([0, 0, 3]),
    )  # fmt: skip
    core.submit(
        b"c",
        Generate(
            id=name, prompt=prompt, sampling=sampling, adapter=adapter, cache_salt=salt, share=share, priority=priority,
            deadline_seconds=dice.choice([0.0, 0.0, 0.001, 60.0]), prompt_logprobs=dice.random() < 0.05,
        ),
    )  # fmt: skip


def swap(core: Engine, number: int, dice: random.Random, digests: list[str]) -> None:
    """Load or unload an adapter under traffic."""
    digest, name = dice.choice(digests), f"swap {number}"
    if dice.random() < 0.8:
        core.load_adapter(b"c", LoadAdapter(id=name, digest=digest, path=digest))
    else:
        core.unload_adapter(b"c", UnloadAdapter(id=name, digest=digest))


def test_a_long_mixed_run_leaves_memory_blocks_and_slots_as_they_were(
    core: Engine, make_artifact: Callable[..., str]
) -> None:
    digests = [make_artifact(seed, targets=["q_proj"]) for seed in range(4)]
    dice, process = random.Random(0), psutil.Process()
    endings: dict[str, str] = {}
    asked = commands = memory = 0
    while asked < REQUESTS or core.in_flight or commands:
        while asked < REQUESTS and core.in_flight < IN_FLIGHT:
            ask(core, asked, dice, digests)
            asked += 1
            if dice.random() < 0.1:
                core.cancel(b"c", str(asked - dice.randint(1, IN_FLIGHT)))
            if dice.random() < 0.08:
                swap(core, asked, dice, digests)
                commands += 1
        core.step()
        for _, message in core.outbox:
            if isinstance(message, Finished | Pooled):
                assert message.id not in endings
                endings[message.id] = (message.code or message.reason) if isinstance(message, Finished) else "pooled"
            commands -= isinstance(message, Done)
        core.outbox.clear()
        if not memory and asked > REQUESTS // 4:
            memory = process.memory_info().rss
    growth = process.memory_info().rss - memory
    status = core.status("check")
    kinds = Counter(endings.values())
    assert len(endings) == REQUESTS
    assert kinds.keys() == {"length", "cancelled", "deadline", "adapter_not_loaded", "pooled"}
    assert kinds["length"] > REQUESTS // 2, kinds
    assert min(kinds.values()) > REQUESTS // 100, kinds
    assert (status.running, status.waiting, status.blocks_free) == (0, 0, status.blocks_total)
    assert all(slot.references == 0 for slot in status.slots)
    assert growth < MOST_GROWTH, f"{growth >> 20} MB more than after the first quarter"
