"""Batching, preemption and accounting: nobody's tokens depend on the company, and nothing is left behind."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.memory.blocks import BlockPool, OutOfBlocks
from engine.messages import Finished, Generate, Priority, Sampling, Tokens
from engine.offline import LocalEngine, collect
from tests.engine.conftest import EngineMaker, ModelMaker

GREEDY = Sampling(temperature=0.0, seed=0, max_tokens=24)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(4, 160, (size,), generator=generator).tolist() for size in sizes]


def request(name: str, prompt: list[int], priority: Priority = "interactive", **sampling: float) -> Generate:
    values = {"temperature": 0.0, "seed": 0, "max_tokens": 8} | sampling
    return Generate(id=name, prompt=prompt, priority=priority, sampling=Sampling(**values))  # type: ignore[arg-type]


def assert_nothing_is_held(engine: LocalEngine) -> None:
    status = engine.core.status("check")
    assert (status.running, status.waiting, status.blocks_free) == (0, 0, status.blocks_total)
    assert all(slot.references == 0 for slot in status.slots)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_p=0.9, seed=11, max_tokens=24)])
def test_tokens_are_the_same_alone_and_in_a_batch(sampling: Sampling, engine: LocalEngine) -> None:
    asked = prompts(12)
    together = [done.token_ids for done in engine.generate(asked, sampling)]
    alone = [engine.generate([prompt], sampling)[0].token_ids for prompt in asked]
    assert together == alone
    assert_nothing_is_held(engine)


def test_a_long_prompt_in_small_steps_gives_the_same_tokens(model_dir: Path, make_engine: EngineMaker) -> None:
    asked = [list(range(4, 150)), *prompts(5)]
    whole = [done.token_ids for done in make_engine(model_dir).generate(asked, GREEDY)]
    chopped = [done.token_ids for done in make_engine(model_dir, step_tokens=16).generate(asked, GREEDY)]
    assert chopped == whole


def test_preempted_sequences_continue_with_the_same_tokens(model_dir: Path, make_engine: EngineMaker) -> None:
    asked = prompts(10, seed=2)
    sampling = Sampling(temperature=0.8, seed=5, max_tokens=100)
    roomy = [done.token_ids for done in make_engine(model_dir).generate(asked, sampling)]
    tight = make_engine(model_dir, kv_tokens=256)
    for index, prompt in enumerate(asked):
        tight.core.submit(b"c", Generate(id=str(index), prompt=prompt, sampling=sampling))
    sequences = list(tight.core._sequences.values())
    while tight.core.step():
        assert (
            len({block for sequence in sequences for block in sequence.blocks}) == 16 - tight.core.scheduler.pool.free
        )
    done = collect(tight.core)
    assert sum(sequence.preemptions for sequence in sequences) > 0
    assert [done[str(index)].token_ids for index in range(10)] == roomy
    assert_nothing_is_held(tight)


def test_interactive_requests_overtake_batch_ones(model_dir: Path, make_engine: EngineMaker) -> None:
    engine = make_engine(model_dir, max_running=2)
    for index in range(6):
        engine.core.submit(b"c", request(f"batch{index}", [5, 6, 7], "batch", max_tokens=30))
    engine.core.step()
    engine.core.submit(b"c", request("urgent", [8, 9], max_tokens=3))
    while engine.core.step():
        continue
    ends = [message.id for _, message in engine.core.outbox if isinstance(message, Finished)]
    assert ends[0] == "urgent"
    assert sorted(ends[1:]) == [f"batch{index}" for index in range(6)]


def test_a_stop_token_ends_the_sequence_and_is_counted(engine: LocalEngine) -> None:
    free = engine.generate([[9, 10, 11]], GREEDY)[0].token_ids
    stop = free[5]
    done = engine.generate([[9, 10, 11]], Sampling(temperature=0.0, seed=0, max_tokens=24, stop_token_ids=(stop,)))[0]
    assert done.token_ids == free[: free.index(stop) + 1]
    assert (done.finished.reason, done.finished.completion_tokens) == ("stop", len(done.token_ids))


def test_generation_stops_where_the_context_ends(model_dir: Path, make_engine: EngineMaker) -> None:
    engine = make_engine(model_dir, max_context=40)
    done = engine.generate([list(range(5, 35))], Sampling(temperature=0.0, seed=0, max_tokens=100))[0]
    assert (done.finished.reason, len(done.token_ids)) == ("length", 10)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (request("x", []), "invalid_request"),
        (request("x", [5, 160]), "invalid_request"),
        (request("x", [-1]), "invalid_request"),
        (request("x", [5], max_tokens=0), "invalid_request"),
        (request("x", [5], temperature=-0.5), "invalid_request"),
        (request("x", [5] * 512), "prompt_too_long"),
        (Generate(id="x", prompt=[5], sampling=GREEDY, adapter="0" * 64), "adapter_not_loaded"),
    ],
)
def test_requests_that_cannot_run_are_answered_at_once(bad: Generate, code: str, engine: LocalEngine) -> None:
    engine.core.submit(b"c", bad)
    ((_, answer),) = engine.core.outbox
    assert isinstance(answer, Finished)
    assert (answer.reason, answer.code) == ("error", code)
    assert answer.error
    assert_nothing_is_held(engine)


def test_too_many_requests_are_answered_overloaded(model_dir: Path, make_engine: EngineMaker) -> None:
    engine = make_engine(model_dir)
    object.__setattr__(engine.core.config, "max_waiting", 2)
    for name in ("a", "b", "c"):
        engine.core.submit(b"c", request(name, [5]))
    codes = [message.code for _, message in engine.core.outbox if isinstance(message, Finished)]
    assert codes == ["overloaded"]


def test_a_failing_step_answers_its_rows_and_the_engine_goes_on(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("out of everything")

    with monkeypatch.context() as patch:
        patch.setattr(engine.core.runner.forward, "run", explode)
        failed = engine.generate([[5, 6]], GREEDY)[0].finished
    assert (failed.reason, failed.code) == ("error", "internal")
    assert "out of everything" in capfd.readouterr().err
    assert engine.generate([[5, 6]], GREEDY)[0].finished.reason == "length"
    assert_nothing_is_held(engine)


@pytest.fixture(scope="module")
def tight_engine(make_model: ModelMaker) -> LocalEngine:
    """A small pool, so that random mixes run into preemption."""
    engine = LocalEngine(make_model(), precision="fp32", threads=1, kv_tokens=320, max_running=6, step_tokens=24)
    yield engine
    engine.close()


moves = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 300), st.integers(1, 60), st.sampled_from(["interactive", "batch"])),
    st.tuples(st.just("cancel"), st.integers(0, 40)),
    st.tuples(st.just("vanish"), st.integers(0, 2)),
    st.tuples(st.just("fail")),
    st.tuples(st.just("step"), st.integers(1, 12)),
)


@given(script=st.lists(moves, max_size=40))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_of_endings_leaves_nothing_behind(script: list[tuple], tight_engine: LocalEngine) -> None:
    core, asked = tight_engine.core, []
    core.outbox = []
    for move in script:
        match move:
            case ("submit", size, tokens, priority):
                client, name = bytes([len(asked) % 3]), str(len(asked))
                asked.append((client, name))
                core.submit(client, request(name, [7] * size, priority, max_tokens=tokens))
            case ("cancel", index) if index < len(asked):
                core.cancel(*asked[index])
            case ("vanish", number):
                core.cancel_client(bytes([number]))
                asked = [(client, name) if client != bytes([number]) else (b"gone", name) for client, name in asked]
            case ("fail",) if core.scheduler.running:
                core._end(core.scheduler.running[0], "error", "internal", "made to fail")
            case ("step", count):
                for _ in range(count):
                    core.step()
    while core.step():
        continue
    assert_nothing_is_held(tight_engine)
    ended = sorted(message.id for _, message in core.outbox if isinstance(message, Finished))
    owed = {name for client, name in asked if client != b"gone"}
    assert len(ended) == len(set(ended))
    assert owed <= set(ended)
    lengths = {message.id: message.completion_tokens for _, message in core.outbox if isinstance(message, Finished)}
    for name in owed:
        sent = sum(
            len(message.token_ids) for _, message in core.outbox if isinstance(message, Tokens) and message.id == name
        )
        assert sent == lengths[name]


def test_the_pool_gives_all_or_nothing_and_takes_back_once() -> None:
    pool = BlockPool(64, 16)
    taken = pool.take(3)
    with pytest.raises(OutOfBlocks):
        pool.take(2)
    assert pool.free == 1
    assert 0 not in taken
    pool.give_back(taken)
    with pytest.raises(AssertionError, match="returned twice"):
        pool.give_back(taken[:1])


def test_a_sequence_ends_once_however_often_it_is_ended(engine: LocalEngine) -> None:
    engine.core.submit(b"c", request("once", [5, 6, 7], max_tokens=30))
    engine.core.step()
    (sequence,) = engine.core.scheduler.running
    engine.core._end(sequence, "cancelled")
    engine.core._end(sequence, "error", "internal", "again")
    ends = [message.reason for _, message in engine.core.outbox if isinstance(message, Finished)]
    assert ends == ["cancelled"]
    assert_nothing_is_held(engine)


def test_what_is_not_finite_in_a_freed_block_does_not_reach_its_next_holder(
    model_dir: Path, make_engine: EngineMaker
) -> None:
    engine = make_engine(model_dir, native=False)
    asked = prompts(6)
    expected = [done.token_ids for done in engine.generate(asked, GREEDY)]
    engine.core.scheduler.prefix.forget("")
    cache = engine.core.forward.cache
    # All but the null block, which nobody writes.
    cache._pages.unflatten(1, (-1, cache.blocks))[:, :, 1:] = float("nan")
    assert [done.token_ids for done in engine.generate(asked, GREEDY)] == expected
