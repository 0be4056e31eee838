"""What drafting with heads costs on the native CPU path: random heads on the starter model. Microseconds, medians.

    python -m benchmarks.drafting [--precision fp32|bf16] [--temperature 0.7]

`call` is one proposal for all rows; `a token` that over the tokens it drafted. `python` is a call of as many rows whose
slots are empty: what the interpreter takes of it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.config import EngineConfig, Precision
from engine.layers.sampler import Draw
from engine.messages import Sampling
from engine.models.registry import read_spec
from engine.native.decoder import NativeDecoder
from engine.native.drafting import NativeDrafter
from engine.runner.build import build_forward
from engine.speculation.heads import Ask
from engine.speculation.loading import Limits, Speculator

STARTER = Path(__file__).parents[1] / "engine" / "starter"
ROWS, HEADS, VOCABULARIES = (1, 4, 16), (4, 8), (512, 1024, 2048, 4096)
REPEATS = 501
# Four standard deviations of the logits: about as sure of themselves as trained heads.
SPREAD = 4.0


def random_speculator(hidden: int, heads: int, vocabulary: int, tokens: int) -> Speculator:
    """Heads with Hydra's conditioning, one head after the other."""
    generator = torch.Generator().manual_seed(heads * vocabulary)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    return Speculator(
        digest="",
        adapter=None,
        recurrent=True,
        tokens_V=torch.arange(tokens - vocabulary, tokens, dtype=torch.int32),
        weight_KEE=normal(heads, hidden, hidden, std=0.5 * hidden**-0.5),
        bias_KE=normal(heads, hidden, std=0.1),
        condition_CVE=normal(heads, vocabulary + 1, hidden, std=0.5),
        head_VE=normal(vocabulary, hidden, std=SPREAD * hidden**-0.5),
        confidence_KF=normal(heads, hidden + 1, std=hidden**-0.5),
        confidence_bias_K=torch.zeros(heads),
    )


def microseconds(work: Callable[[], object]) -> float:
    """The median of one call."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def measure(forward: NativeDecoder, temperature: float) -> None:
    """Print a line for every size."""
    hidden, tokens = forward.spec.hidden_size, max(VOCABULARIES)
    limits = Limits(hidden=hidden, tokens=tokens, heads=max(HEADS), vocabulary=tokens)
    drafter = NativeDrafter(forward, limits, 1)
    sampling = Sampling(temperature=temperature, seed=1, max_tokens=1)
    print(f"{'V':>5} {'heads':>5} {'rows':>4} {'call':>8} {'a token':>8} {'python':>8}")
    for vocabulary in VOCABULARIES:
        for heads in HEADS:
            drafter.fill(1, drafter.prepare(random_speculator(hidden, heads, vocabulary, tokens)))
            for rows in ROWS:
                hidden_RE = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows))
                asks = [Ask(1, row, Draw(sampling, 0, row), heads) for row in range(rows)]
                empty = [ask._replace(slot=0) for ask in asks]
                call = microseconds(lambda: drafter.propose(hidden_RE, asks))  # noqa: B023
                python = microseconds(lambda: drafter.propose(hidden_RE, empty))  # noqa: B023
                print(f"{vocabulary:5} {heads:5} {rows:4} {call:8.1f} {call / rows / heads:8.1f} {python:8.1f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What drafting with heads costs.")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--temperature", type=float, default=0.0)
    asked = parser.parse_args()
    precision: Precision = asked.precision
    with tempfile.TemporaryDirectory() as room:
        config = EngineConfig(model=STARTER, artifacts=Path(room), precision=precision, device="cpu")
        forward = build_forward(config, read_spec(STARTER), blocks=8, positions=64)
        if not isinstance(forward, NativeDecoder):
            raise SystemExit("this machine has no native CPU path: python -m engine.native.build says why")
        print(f"{forward.kernels}, {precision}, temperature {asked.temperature}")
        measure(forward, asked.temperature)
        forward.close()


if __name__ == "__main__":
    main()
