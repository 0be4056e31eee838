"""The engine without HTTP, log or process boundary: a closed loop inside this process, one JSON line a cell.

    python -m benchmarks.engine_alone --model DIR [--precision bf16] [--shapes 350/50] [--concurrency 1,4,16]

An engine that may run `c` sequences at once and has many waiting is a closed loop of concurrency `c` whose users
think for no time at all: the ceiling of what the gateway could reach.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.shapes import make_prompts, parse_shape, waves_to_fill
from engine.messages import Sampling
from engine.offline import LocalEngine
from engine.process import KEEP_BYTES, tune_heap
from engine.text.tokenizer import Tokenizer


def main() -> None:
    """Measure every shape at every concurrency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.random_models")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--shapes", default="350/50,120/25,50/100")
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of a measurement")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    tune_heap(KEEP_BYTES)
    words = json.loads((options.model / "words.json").read_text())
    tokenizer = Tokenizer.load(options.model)
    for concurrency in (int(part) for part in options.concurrency.split(",")):
        with LocalEngine(options.model, precision=options.precision, max_running=concurrency) as engine:
            for shape in options.shapes.split(","):
                length, tokens = parse_shape(shape)
                seed = f"{options.seed} {shape} {concurrency}"
                prompts = [tokenizer.encode(text) for text in make_prompts(words, length, 64 * concurrency, seed)]
                cell = {"shape": shape, "concurrency": concurrency}
                print(json.dumps(cell | measure(engine, prompts, tokens, concurrency, options.seconds)), flush=True)


def measure(
    engine: LocalEngine, prompts: list[list[int]], tokens: int, concurrency: int, seconds: float
) -> dict[str, float | int]:
    """Tokens a second over as many rounds of `concurrency` requests as the time takes; the first one warms up."""
    first = timed(engine, prompts[:concurrency], tokens)
    waves = waves_to_fill(seconds, first, most=len(prompts) // concurrency - 1)
    asked = prompts[concurrency : (1 + waves) * concurrency]
    took = timed(engine, asked, tokens)
    return {
        "requests": len(asked),
        "seconds": round(took, 3),
        "tokens_per_second": round(len(asked) * tokens / took, 2),
    }


def timed(engine: LocalEngine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds until all are answered in full. Raises RuntimeError when one is not."""
    began = time.perf_counter()
    answers = engine.generate(prompts, Sampling(temperature=0.0, seed=0, max_tokens=tokens))
    took = time.perf_counter() - began
    if any(len(answer.token_ids) != tokens for answer in answers):
        raise RuntimeError(f"an answer is not {tokens} tokens long: {answers[0].finished}")
    return took


if __name__ == "__main__":
    main()
