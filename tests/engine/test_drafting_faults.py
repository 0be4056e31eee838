"""A draft is only a guess: whatever goes wrong with it, answers come as they would without."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import Done, Finished, Generate, Learn, LoadSpeculator, Sampling, Tokens

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6, 7]
CLIENT = b"c"


@pytest.fixture
def core(model_dir: Path, artifacts: Path) -> Iterator[Engine]:
    made = Engine(config(model_dir, artifacts))
    yield made
    made.close()


def config(model: Path, artifacts: Path, *, speculation: bool = True) -> EngineConfig:
    return EngineConfig(
        model=model, artifacts=artifacts, precision="fp32", device="cpu", threads=1, kv_tokens=512, step_tokens=64,
        speculation=speculation,
    )  # fmt: skip


def answer(core: Engine, name: str, *, speculate: bool = True) -> list[int]:
    """A greedy answer, to its end."""
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=24)
    core.submit(CLIENT, Generate(id=name, prompt=PROMPT, sampling=sampling, namespace="n", speculate=speculate))
    while core.in_flight:
        core.step()
    tokens = [token for _, message in core.outbox if isinstance(message, Tokens) for token in message.token_ids]
    endings = [message for _, message in core.outbox if isinstance(message, Finished)]
    core.outbox.clear()
    assert [ending.reason for ending in endings] == ["length"]
    return tokens


def told(core: Engine) -> Done:
    """The answer to a command."""
    while not core.outbox:
        core.step()
    (_, done), *_ = core.outbox
    core.outbox.clear()
    assert isinstance(done, Done)
    return done


def test_a_drafter_that_fails_costs_its_drafts_only(core: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    right = answer(core, "plain", speculate=False)
    free = core.scheduler.pool.free
    with mock.patch.object(core.drafting._proposing, "ask", side_effect=RuntimeError("out of order")):
        assert answer(core, "broken") == right
    assert "out of order" in capsys.readouterr().err
    assert core.scheduler.pool.free == free
    assert not core.scheduler.copies
    assert answer(core, "mended") == right


@pytest.mark.parametrize("broken", ["clear", "copy"])
def test_a_step_that_fails_to_prepare_blocks_leaves_nothing_to_be_written_into_them_later(
    core: Engine, broken: str
) -> None:
    core.scheduler.fresh, core.scheduler.copies = [2], [(1, 2)]
    with (
        mock.patch.object(core.forward, broken, side_effect=RuntimeError("out of order")),
        pytest.raises(RuntimeError, match="out of order"),
    ):
        core._prepare()
    assert (core.scheduler.fresh, core.scheduler.copies) == ([], [])


@pytest.mark.parametrize("token", [-1, 10**6, 1 << 31, 1 << 40])
def test_tokens_that_this_model_does_not_have_are_not_learnt(core: Engine, token: int) -> None:
    core.learn(CLIENT, Learn(id="l", namespace="n", responses=[[5, 6], [7, token]]))
    assert "another model" in told(core).error
    assert core.drafting.corpora.status() == []
    assert answer(core, "after") == answer(core, "again", speculate=False)


def test_an_engine_without_speculation_keeps_and_loads_nothing(model_dir: Path, artifacts: Path) -> None:
    core = Engine(config(model_dir, artifacts, speculation=False))
    core.learn(CLIENT, Learn(id="l", namespace="n", responses=[[5, 6, 7]]))
    assert told(core).error == ""
    core.load_speculator(CLIENT, LoadSpeculator(id="s", digest="d", path="d"))
    assert "--no-speculation" in told(core).error
    answer(core, "one")
    status = core.status("s")
    assert (status.corpora, status.speculators_total, status.costs) == ([], 0, [])
    core.close()
