"""Command line to configuration, and what is chosen where the caller left a choice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, parse
from engine.runner.placement import choose_dtype, choose_threads
from tests.engine.conftest import EngineMaker
from tests.engine.test_attention import SPEC

REQUIRED = ["--model", "m", "--socket", "ipc://s", "--artifacts", "a"]


def test_the_command_line_fills_the_configuration() -> None:
    config = parse([*REQUIRED, "--threads", "2", "--kv-tokens", "512", "--adapter-rank", "4", "--precision", "fp32"])
    assert (config.model, config.socket, config.artifacts) == (Path("m"), "ipc://s", Path("a"))
    assert (config.threads, config.kv_tokens, config.adapter_rank, config.precision) == (2, 512, 4, "fp32")
    assert config.step_tokens == EngineConfig(model=Path(), artifacts=Path()).step_tokens
    assert config.speculation
    assert not parse([*REQUIRED, "--no-speculation"]).speculation


@pytest.mark.parametrize(
    "mistake",
    [
        ["--kv-tokens", "1"],
        ["--adapter-slots", "1"],
        ["--threads", "-1"],
        ["--precision", "int3"],
        ["--speculator-slots", "0"],
        ["--speculator-heads", "0"],
        ["--speculator-vocabulary", "8"],
        ["--suffix-tokens", "100"],
        ["--no-such-option"],
    ],
)
def test_mistakes_on_the_command_line_end_with_a_sentence(
    mistake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([*REQUIRED, *mistake])
    assert mistake[0] in capsys.readouterr().err


def test_a_small_model_gets_one_thread_and_a_given_number_is_kept() -> None:
    config = EngineConfig(model=Path(), artifacts=Path())
    assert choose_threads(config, SPEC) == 1
    assert choose_threads(replace(config, threads=3), SPEC) == 3


def test_precision_is_what_was_asked() -> None:
    config = EngineConfig(model=Path(), artifacts=Path(), precision="bf16")
    assert choose_dtype(config, torch.device("cpu")) == torch.bfloat16
    assert choose_dtype(replace(config, precision="fp32"), torch.device("cpu")) == torch.float32


def test_the_context_is_the_smallest_of_model_cache_and_wish(model_dir: Path, make_engine: EngineMaker) -> None:
    limits = [
        make_engine(model_dir, **options).core.max_context for options in ({}, {"kv_tokens": 256}, {"max_context": 99})
    ]
    assert limits == [512, 256, 99]
