"""What the engine is told at start. Read once from the command line, immutable afterwards."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "int8"]
Device = Literal["auto", "cpu", "cuda"]
NUMBERS = (
    "threads", "kv_tokens", "max_context", "max_running", "max_waiting", "step_tokens", "adapter_slots", "adapter_rank",
    "speculator_slots", "speculator_heads", "speculator_vocabulary", "suffix_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and places. Zero means "choose": `threads` by model size, `max_context` the model's own, limited by the KV.

    `kv_tokens` is what the KV cache holds over all sequences; `step_tokens` what one step computes at most;
    `max_waiting` how many requests may wait or run before new ones are answered `overloaded`. `pack` and `native`
    switch the fast CPU paths off, for comparison; `int8` keeps weights in eight bits and computes in bf16.
    Speculators have up to `speculator_heads` heads over `speculator_vocabulary` token ids; `suffix_tokens` is how many
    tokens of past answers are kept for each namespace.
    """

    model: Path
    artifacts: Path
    socket: str = ""
    precision: Precision = "auto"
    device: Device = "auto"
    threads: int = 0
    kv_tokens: int = 32768
    max_context: int = 0
    max_running: int = 64
    step_tokens: int = 512
    adapter_slots: int = 8
    adapter_rank: int = 32
    max_waiting: int = 2048
    pack: bool = True
    native: bool = True
    prefix_cache: bool = True
    speculation: bool = True
    speculator_slots: int = 4
    speculator_heads: int = 8
    speculator_vocabulary: int = 4096
    suffix_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        _require(self.kv_tokens >= 256, "--kv-tokens must be at least 256")
        _require(self.max_running >= 1, "--max-running must be at least 1")
        _require(self.max_waiting >= 1, "--max-waiting must be at least 1")
        _require(self.step_tokens >= 16, "--step-tokens must be at least 16")
        _require(self.adapter_slots >= 2, "--adapter-slots must be at least 2: one serves while the other loads")
        _require(self.adapter_rank >= 1, "--adapter-rank must be at least 1")
        _require(self.speculator_slots >= 1, "--speculator-slots must be at least 1; --no-speculation drafts nothing")
        _require(self.speculator_heads >= 1, "--speculator-heads must be at least 1")
        _require(self.speculator_vocabulary >= 16, "--speculator-vocabulary must be at least 16")
        _require(1024 <= self.suffix_tokens <= 1 << 28, "--suffix-tokens must lie between 1024 and 2^28")
        _require(self.max_context >= 0 and self.threads >= 0, "--max-context and --threads must not be negative")


def parse(arguments: Sequence[str] | None = None) -> EngineConfig:
    """The configuration from command-line arguments; prints usage and exits on a mistake."""
    parser = argparse.ArgumentParser(prog="python -m engine.process", description="Run Whet's engine.")
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json and safetensors")
    parser.add_argument("--socket", required=True, help="ZeroMQ address to serve on, ipc://…")
    parser.add_argument("--artifacts", type=Path, required=True, help="root below which adapters may be loaded")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "int8"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name in NUMBERS:
        default = EngineConfig.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--no-native", dest="native", action="store_false", help="run on torch's kernels only")
    parser.add_argument(
        "--no-prefix-cache", dest="prefix_cache", action="store_false", help="compute every prompt from its beginning"
    )
    parser.add_argument(
        "--no-speculation", dest="speculation", action="store_false", help="draft no tokens, one token a step"
    )
    values = vars(parser.parse_args(arguments))
    try:
        return EngineConfig(**values)
    except ValueError as error:
        parser.error(str(error))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
