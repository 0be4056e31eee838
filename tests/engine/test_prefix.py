"""The prefix cache: what is found again, what is never shared, and what leaves first."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.core import Engine
from engine.memory import prefix as prefix_module
from engine.memory.blocks import BlockPool
from engine.memory.prefix import PrefixCache
from engine.messages import Finished, Forget, Generate, Pool, Pooled, PromptLogprobs, Sampling
from engine.offline import LocalEngine, collect
from tests.engine.conftest import EngineMaker
from tests.engine.fake_world import World, check

SIZE = 16
TEXT = [index % 150 + 4 for index in range(100)]
GREEDY = Sampling(temperature=0.0, seed=0, max_tokens=8)


def filled(blocks: int = 8) -> tuple[BlockPool, PrefixCache]:
    """A pool and its cache."""
    pool = BlockPool(blocks * SIZE, SIZE)
    return pool, PrefixCache(pool, "base", "fp32")


def store(pool: BlockPool, cache: PrefixCache, tokens: list[int], *, adapter: str | None = None, salt: str = "") -> int:
    """Cache all full blocks of a text nobody holds any more; how many are known now."""
    root = cache.open(adapter, salt, "n")
    before, held = root, []
    for start in range(0, len(tokens) // SIZE * SIZE, SIZE):
        held += pool.take(1)
        before = cache.add(root, before, tokens[start : start + SIZE], held[-1])
        if before is None:
            break
    pool.give_back(held)
    cache.close(root)
    return len(cache)


def hits(cache: PrefixCache, tokens: list[int], *, adapter: str | None = None, salt: str = "") -> int:
    root = cache.open(adapter, salt, "n")
    found = cache.find(root, tokens)
    cache.close(root)
    return len(found)


def run(engine: LocalEngine, name: str, prompt: list[int], **fields: object) -> Finished:
    (done,) = engine.generate([Generate(id=name, prompt=prompt, sampling=GREEDY, **fields)])
    return done.finished


def test_full_blocks_are_found_again_and_one_token_is_left_to_compute() -> None:
    pool, cache = filled()
    store(pool, cache, TEXT[:48])
    assert [hits(cache, TEXT[:length]) for length in (16, 17, 32, 33, 48, 49, 100)] == [0, 1, 1, 2, 2, 3, 3]
    assert hits(cache, [9, *TEXT[1:60]]) == 0
    assert pool.free == pool.total


@pytest.mark.parametrize(("adapter", "salt"), [(None, "s"), ("a", ""), ("b", "s"), ("", ""), ("base", "")])
def test_another_adapter_or_salt_finds_nothing(adapter: str | None, salt: str) -> None:
    pool, cache = filled()
    store(pool, cache, TEXT[:48])
    assert hits(cache, TEXT, adapter=adapter, salt=salt) == 0
    assert hits(cache, TEXT) == 3


def test_names_that_read_alike_when_joined_are_different_roots() -> None:
    pool, cache = filled()
    store(pool, cache, TEXT[:48], adapter="ab", salt="c")
    assert hits(cache, TEXT, adapter="a", salt="bc") == 0


@pytest.mark.parametrize("origin", [("other", "fp32"), ("base", "bf16"), ("base", "int8")])
def test_another_base_or_precision_has_other_roots(origin: tuple[str, str]) -> None:
    pool, cache = filled()
    store(pool, cache, TEXT[:48])
    cache._origin = origin
    assert hits(cache, TEXT) == 0


def test_equal_hashes_never_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_module, "chain", lambda *_: 7)
    pool, cache = filled()
    assert store(pool, cache, TEXT[:16]) == 1
    assert store(pool, cache, [9] * 16) == 1
    assert store(pool, cache, TEXT[:16], salt="s") == 1
    assert (hits(cache, TEXT), hits(cache, [9] * 20), hits(cache, TEXT, salt="s")) == (1, 0, 0)
    assert store(pool, cache, TEXT[:16] * 2) == 1
    assert hits(cache, TEXT[:16] * 3) == 1


def test_requests_whose_hashes_all_collide_are_still_answered_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_module, "chain", lambda *_: 7)
    world = World(max_running=4)
    for index in range(12):
        sampling = Sampling(seed=0, max_tokens=20)
        world.core.submit(b"c", Generate(id=str(index), prompt=[index % 3] * 40, sampling=sampling))
    while world.step():
        check(world.core)
    assert len(collect(world.core)) == 12


def test_the_end_of_the_text_that_was_idle_longest_leaves_first() -> None:
    pool, cache = filled(6)
    store(pool, cache, TEXT[:48])
    store(pool, cache, [9] * 48)
    assert hits(cache, TEXT) == 3
    root = cache.open(None, "", "n")
    for node in cache.find(root, TEXT):
        pool.share(node.block)
    pool.give_back([node.block for node in cache.find(root, TEXT)])
    pool.give_back(pool.take(2))
    assert (hits(cache, [9] * 100), hits(cache, TEXT)) == (1, 3)
    pool.give_back(pool.take(6))
    assert len(cache) == 0


def test_forgetting_a_namespace_drops_its_salts_and_only_them() -> None:
    pool, cache = filled()
    store(pool, cache, TEXT[:48], salt="mine")
    other = cache.open(None, "theirs", "other")
    block = pool.take(1)
    assert cache.add(other, other, TEXT[:16], block[0]) is not None
    cache.forget("n")
    assert (hits(cache, TEXT, salt="mine"), len(cache.find(other, TEXT))) == (0, 1)
    pool.give_back(block)
    assert pool.free == pool.total


def test_roots_without_requests_and_blocks_are_not_kept() -> None:
    pool, cache = filled()
    for salt in range(200):
        cache.close(cache.open(None, str(salt), "n"))
    store(pool, cache, TEXT[:48], salt="last")
    assert len(cache._roots) == 1
    pool.give_back(pool.take(pool.total))
    assert len(cache._roots) == 0


def test_a_second_request_computes_only_what_is_new(engine: LocalEngine) -> None:
    cold = engine.generate([Generate(id="cold", prompt=TEXT, sampling=GREEDY, speculate=False)])[0]
    steps = engine.core._steps
    warm = engine.generate([Generate(id="warm", prompt=TEXT, sampling=GREEDY, speculate=False)])[0]
    assert (cold.finished.cached_tokens, warm.finished.cached_tokens) == (0, 96)
    assert warm.token_ids == cold.token_ids
    assert engine.core._steps - steps == len(warm.token_ids)
    assert torch.tensor(warm.logprobs) == pytest.approx(torch.tensor(cold.logprobs), abs=1e-4)


def test_an_answer_is_cached_for_the_next_turn(engine: LocalEngine) -> None:
    long = Sampling(temperature=0.0, seed=0, max_tokens=40)
    answer = engine.generate([Generate(id="first", prompt=TEXT[:30], sampling=long)])[0].token_ids
    assert run(engine, "second", [*TEXT[:30], *answer, 5, 6]).cached_tokens == 64


def test_choices_of_one_prompt_compute_it_once(engine: LocalEngine) -> None:
    noisy = Sampling(temperature=1.0, seed=3, max_tokens=6)
    asked = [Generate(id=str(choice), prompt=TEXT, sampling=noisy, choice=choice) for choice in range(4)]
    together = engine.generate(asked)
    assert [done.finished.cached_tokens for done in together] == [0, 96, 96, 96]
    assert len({tuple(done.token_ids) for done in together}) > 1
    alone = [engine.generate([request])[0].token_ids for request in asked]
    assert [done.token_ids for done in together] == alone


def test_nothing_is_shared_when_it_is_switched_off(model_dir: Path) -> None:
    config = EngineConfig(
        model=model_dir, artifacts=model_dir, precision="fp32", threads=1, kv_tokens=1024, prefix_cache=False
    )
    core = Engine(config)
    for name in ("a", "b"):
        core.submit(b"c", Generate(id=name, prompt=TEXT, sampling=GREEDY))
        while core.step():
            continue
    core.close()
    done = collect(core)
    assert [done[name].finished.cached_tokens for name in "ab"] == [0, 0]
    assert done["a"].token_ids == done["b"].token_ids


def test_adapters_never_read_each_others_blocks(
    engine: LocalEngine, artifacts: Path, make_artifact: Callable[..., str]
) -> None:
    first, second = (engine.load_adapter(artifacts / make_artifact(seed)) for seed in (1, 2))
    assert run(engine, "base", TEXT).cached_tokens == 0
    assert run(engine, "first", TEXT, adapter=first).cached_tokens == 0
    assert run(engine, "second", TEXT, adapter=second).cached_tokens == 0
    assert run(engine, "again", TEXT, adapter=first).cached_tokens == 96
    assert run(engine, "salted", TEXT, adapter=first, cache_salt="s").cached_tokens == 0


def test_forget_reaches_the_cache_through_the_core(engine: LocalEngine) -> None:
    run(engine, "one", TEXT, namespace="project")
    engine.core.forget(b"c", Forget(id="f", namespace="other"))
    assert run(engine, "two", TEXT).cached_tokens == 96
    engine.core.forget(b"c", Forget(id="f", namespace="project"))
    engine.core.outbox = []
    assert run(engine, "three", TEXT).cached_tokens == 0


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    world = World(max_running=1)
    world.core.submit(
        b"c", Generate(id="slow", prompt=TEXT, sampling=Sampling(seed=0, max_tokens=40), priority="batch")
    )
    for _ in range(20):
        world.step()
    (slow,) = world.core.scheduler.running
    world.core.submit(b"c", Generate(id="quick", prompt=[5, 6], sampling=Sampling(seed=0, max_tokens=2)))
    world.step()
    assert (slow.preemptions, slow.computed) == (1, 0)
    world.step()
    world.step()
    assert slow.computed == len(slow.tokens) - 1 > 100
    assert slow.cached_tokens == 0


def test_scored_prompts_and_means_take_nothing_from_the_cache(engine: LocalEngine) -> None:
    run(engine, "warm", TEXT)
    mean = engine.embed([TEXT], "mean")
    engine.core.submit_pool(b"c", Pool(id="last", prompt=TEXT, how="last"))
    engine.core.submit(b"c", Generate(id="scored", prompt=TEXT, sampling=GREEDY, prompt_logprobs=True))
    while engine.core.step():
        continue
    (scores,) = [message for _, message in engine.core.outbox if isinstance(message, PromptLogprobs)]
    (last,) = [message for _, message in engine.core.outbox if isinstance(message, Pooled)]
    assert len(scores.logprobs) == len(TEXT) - 1
    assert last.cached_tokens == 96
    assert collect(engine.core)["scored"].finished.cached_tokens == 0
    logprobs = engine.logits(TEXT).log_softmax(-1)[:-1].gather(1, torch.tensor(TEXT[1:])[:, None]).squeeze(1)
    assert torch.tensor(scores.logprobs) == pytest.approx(logprobs, abs=1e-4)
    states = engine.hidden_states(TEXT)
    assert mean[0] == pytest.approx(states.float().mean(0), abs=1e-4)
    assert torch.frombuffer(bytearray(last.vector), dtype=torch.float32) == pytest.approx(states[-1].float(), abs=1e-4)


def test_blocks_of_a_row_that_was_not_finite_are_never_found() -> None:
    world = World()
    world.runner.poison.add("bad")
    for name in ("bad", "good"):
        world.core.submit(b"c", Generate(id=name, prompt=TEXT, sampling=Sampling(seed=0, max_tokens=3)))
        while world.step():
            check(world.core)
    done = collect(world.core)
    assert (done["bad"].finished.code, done["good"].finished.reason) == ("internal", "length")
    assert done["good"].finished.cached_tokens == 0


@pytest.mark.parametrize("native", [True, False])
def test_tokens_are_the_same_alone_crowded_preempted_and_cached(
    native: bool, model_dir: Path, make_engine: EngineMaker
) -> None:
    noisy = Sampling(temperature=0.8, top_p=0.95, seed=7, max_tokens=40)
    asked = [
        Generate(id=str(index), prompt=TEXT[: 20 + 7 * index], sampling=noisy, choice=index % 2) for index in range(10)
    ]
    roomy = make_engine(model_dir, native=native)
    alone = [
        make_engine(model_dir, kv_tokens=1024, native=native).generate([request])[0].token_ids for request in asked[:3]
    ]
    crowd = roomy.generate(asked)
    cached = roomy.generate([*reversed(asked)])[::-1]
    tight = make_engine(model_dir, kv_tokens=320, step_tokens=24, native=native)
    squeezed = tight.generate(asked)
    assert [done.token_ids for done in crowd[:3]] == alone
    assert [done.token_ids for done in cached] == [done.token_ids for done in crowd]
    assert [done.token_ids for done in squeezed] == [done.token_ids for done in crowd]
    assert sum(done.finished.cached_tokens for done in cached) > 300
