"""What the engine process needs besides weights and KV cache, and how long it takes from start to first token.

    python -m benchmarks.memory [--model DIR …] [--precision auto] [--repeats 3]

The KV cache is filled before memory is read, so that every page of it counts as resident.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.figures import DTYPES, STARTER, config_of, load_average, random_prompts, show, spread
from engine.client import EngineClient, EngineGone
from engine.messages import Generate, Sampling

KV_TOKENS = 8192
FILL_PROMPT = 480
START_SECONDS = 120.0


@dataclass(frozen=True)
class Held:
    """Bytes of one engine process after its KV cache was filled, and seconds from its start to the first token."""

    first_token_seconds: float
    resident: int
    proportional: int
    weights: int
    kv: int


def main() -> None:
    """Measure every model and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", default=[STARTER])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for model in options.model:
        runs = [measure(model, options.precision) for _ in range(options.repeats)]
        last = runs[-1]
        over = {"rss": last.resident, "pss": last.proportional}
        show(
            model=str(model), load_average=load_average(),
            first_token_seconds=spread([run.first_token_seconds for run in runs]),
            weights_mb=megabytes(last.weights), kv_mb=megabytes(last.kv),
            **{f"{name}_mb": megabytes(size) for name, size in over.items()},
            **{f"{name}_over_both_mb": megabytes(size - last.weights - last.kv) for name, size in over.items()},
        )  # fmt: skip


def measure(model: Path, precision: str) -> Held:
    """Start an engine, take one token, fill its KV cache, look, stop."""
    began = time.perf_counter()
    with engine(model, precision) as (process, address):
        first, dtype = asyncio.run(first_token(address, model))
        seconds = first - began
        asyncio.run(fill(address, model))
        seen = psutil.Process(process.pid).memory_full_info()
    return Held(seconds, seen.rss, seen.pss, weight_bytes(model, dtype), kv_bytes(config_of(model), dtype))


@contextmanager
def engine(model: Path, precision: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """An engine process on a private socket, stopped by its id."""
    with tempfile.TemporaryDirectory(prefix="whet-m") as directory:
        address = f"ipc://{directory}/e.sock"
        command = [sys.executable, "-m", "engine.process", "--model", str(model), "--socket", address]
        command += ["--artifacts", directory, "--precision", precision, "--kv-tokens", str(KV_TOKENS)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        try:
            yield process, address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


async def first_token(address: str, model: Path) -> tuple[float, str]:
    """When the first token was here (on the performance counter), and the engine's dtype."""
    until = time.perf_counter() + START_SECONDS
    socket = Path(address.removeprefix("ipc://"))
    while not socket.exists() and time.perf_counter() < until:
        await asyncio.sleep(0.01)
    async with EngineClient(address) as client:
        while True:
            try:
                await client.complete(request("first", random_prompts(model, 1, 16, "first")[0], 1))
                return time.perf_counter(), (await client.status()).dtype
            except EngineGone:
                if time.perf_counter() > until:
                    raise


async def fill(address: str, model: Path) -> None:
    """Keep every page of the KV cache in use at once."""
    prompts = random_prompts(model, KV_TOKENS // (FILL_PROMPT + 16), FILL_PROMPT, "fill")
    async with EngineClient(address) as client:
        await asyncio.gather(*(client.complete(request(f"{i}", prompt, 16)) for i, prompt in enumerate(prompts)))


def request(name: str, prompt: list[int], tokens: int) -> Generate:
    return Generate(id=name, prompt=prompt, sampling=Sampling(temperature=0.0, seed=0, max_tokens=tokens))


def weight_bytes(model: Path, dtype: str) -> int:
    """What the checkpoint's weights take in the engine's type (int8: its matrices, so nearly all, a byte each)."""
    stored = 4 if config_of(model).get("dtype") == "float32" else 2
    parameters = sum(file.stat().st_size for file in model.glob("*.safetensors")) // stored
    return parameters * (1 if dtype == "int8" else DTYPES[dtype])


def kv_bytes(config: dict[str, int], dtype: str) -> int:
    """Keys and values of every layer for every token the cache holds."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * DTYPES[dtype] * KV_TOKENS


def megabytes(size: int) -> int:
    return round(size / 1e6)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
