"""What the prefix cache saves: time to the first token of a 1,024-token prompt whose first 90 % ran before, over cold.

    python -m benchmarks.prefix [--model DIR] [--length 1024] [--shared 0.9] [--repeats 5]

Each repeat takes fresh random tokens: a cold prompt, which is measured, and then another that begins as it did.
"""

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.figures import STARTER, load_average, random_prompts, show, spread
from engine.messages import Finished, Sampling
from engine.offline import LocalEngine
from engine.process import KEEP_BYTES, tune_heap

FIRST_TOKEN = Sampling(temperature=0.0, seed=0, max_tokens=1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STARTER)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--shared", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tune_heap(KEEP_BYTES)
    kept = round(options.length * options.shared)
    cold, warm = [], []
    with LocalEngine(options.model, precision=options.precision) as engine:
        for turn in range(options.repeats + 1):
            first, other = random_prompts(options.model, 2, options.length, turn)
            cold.append(ending(engine, first))
            warm.append(ending(engine, first[:kept] + other[kept:]))
    times = {name: [1e3 * one.first_token_seconds for one in runs[1:]] for name, runs in (("c", cold), ("w", warm))}
    show(
        model=str(options.model), length=options.length, shared=kept, load_average=load_average(),
        cached_tokens=sorted({one.cached_tokens for one in warm}),
        cold_ms=spread(times["c"]), warm_ms=spread(times["w"]),
        warm_over_cold=round(statistics.median(times["w"]) / statistics.median(times["c"]), 3),
    )  # fmt: skip


def ending(engine: LocalEngine, prompt: list[int]) -> Finished:
    """How a request for one token ended, times inside the engine included."""
    return engine.generate([prompt], FIRST_TOKEN)[0].finished


if __name__ == "__main__":
    main()
