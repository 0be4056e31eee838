"""What a step costs: milliseconds per decode step and tokens per second, beside transformers' `generate`, in one run.

    python -m benchmarks.engine_steps [--model DIR] [--precision auto|fp32|bf16] [--batches 1,4,16]

Both get the same weights, prompts, precision and threads, greedy, no early stop; runs alternate, and the median, the
minimum and the maximum of `--repeats` are printed as JSON lines. A busy machine makes every figure worse: wait for a
quiet one.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.figures import STARTER, load_average, random_prompts, show, spread, timed
from engine.messages import Generate, Sampling, Tokens
from engine.offline import CLIENT, LocalEngine
from engine.process import KEEP_BYTES, tune_heap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STARTER)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of every prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated for every prompt")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="for the engine alone; transformers stays greedy"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tune_heap(KEEP_BYTES)
    with LocalEngine(options.model, precision=options.precision) as engine:
        dtype = DTYPES[engine.core.status("benchmark").dtype]
        theirs = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        print_setting(engine)
        for batch in (int(part) for part in options.batches.split(",")):
            prompts = random_prompts(options.model, batch, options.prompt, batch)
            sampling = Sampling(temperature=options.temperature, seed=1, max_tokens=options.tokens)
            runs = [
                (engine_run(engine, prompts, sampling), transformers_run(theirs, prompts, options.tokens))
                for _ in range(options.repeats + 1)
            ][1:]
            steps = [run[0][0] for run in runs]
            ours, others = [run[0][1] for run in runs], [run[1] for run in runs]
            report(batch, "engine_step_ms", steps)
            report(batch, "engine_tokens_per_second", [batch * options.tokens / seconds for seconds in ours])
            report(batch, "transformers_tokens_per_second", [batch * options.tokens / seconds for seconds in others])


def engine_run(engine: LocalEngine, prompts: list[list[int]], sampling: Sampling) -> tuple[float, float]:
    """Median milliseconds of a step in which every row generates, and seconds for the whole batch."""
    core = engine.core
    for index, prompt in enumerate(prompts):
        core.submit(CLIENT, Generate(id=str(index), prompt=prompt, sampling=sampling))
    steps: list[float] = []
    began = time.perf_counter()
    while core.busy:
        core.outbox.clear()
        seconds = timed(core.step)
        if sum(isinstance(message, Tokens) for _, message in core.outbox) == len(prompts):
            steps.append(seconds)
    total = time.perf_counter() - began
    core.outbox.clear()
    return 1e3 * statistics.median(steps), total


@torch.inference_mode()
def transformers_run(model: transformers.PreTrainedModel, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for the same batch through `generate` (equal lengths, so there is no padding)."""
    ids = torch.tensor(prompts)
    config = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config))


def report(batch: int, name: str, values: list[float]) -> None:
    """One JSON line: median, minimum, maximum."""
    show(batch=batch, figure=name, **spread(values))


def print_setting(engine: LocalEngine) -> None:
    """What was measured, on what."""
    status = engine.core.status("benchmark")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    setting = {"model": status.model, "dtype": status.dtype, "device": status.device, "threads": status.threads}
    show(**setting, **versions, load_average=load_average())


if __name__ == "__main__":
    main()
