"""What a precision costs in quality: perplexity on the starter's held-out text, and what it gains in speed.

    python -m benchmarks.quality [--model DIR] [--precisions fp32,bf16,int8] [--examples 60]

Text is drawn from the held-out tenth of the three grammars under examples/grammars, prompts rendered as in training.
Perplexity is over the answers (what the model learned to say) and over all tokens of the text.
"""

import argparse
import math
import os
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Tokenizer

from benchmarks.figures import STARTER, load_average, random_prompts, show, timed
from engine.config import Precision
from engine.messages import Sampling
from engine.offline import LocalEngine
from engine.process import KEEP_BYTES, tune_heap
from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from examples.starter_data import Row, make_row

BATCH, PROMPT, TOKENS = 16, 120, 50


def main() -> None:
    """Measure every precision and compare each with the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STARTER)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--examples", type=int, default=60, help="of each application")
    options = parser.parse_args()
    tune_heap(KEEP_BYTES)
    rows = held_out_rows(options.model, options.examples)
    show(
        model=str(options.model), rows=len(rows), tokens=sum(len(row.ids) for row in rows), load_average=load_average()
    )
    reference: dict[str, float] = {}
    for precision in cast(list[Precision], options.precisions.split(",")):
        try:
            figures = measure(options.model, precision, rows)
        except ValueError as error:
            show(precision=precision, unavailable=str(error))
            continue
        reference = reference or figures
        against = {f"{name}_over_first": round(figures[name] / reference[name], 5) for name in figures}
        show(precision=precision, **{name: round(value, 5) for name, value in figures.items()}, **against)


def held_out_rows(model: Path, examples: int) -> list[Row]:
    """Prompts with the answers the base rules ask for, of facts no training example had."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    drawn = [example for app in APPLICATIONS.values() for example in islice(stream(app, "held_out", 0), examples)]
    return [make_row(tokenizer, example.messages, example.base) for example in drawn]


def measure(model: Path, precision: Precision, rows: list[Row]) -> dict[str, float]:
    """Perplexity of answers and of all text, and tokens a second at a batch of 16. Raises ValueError when the engine
    has no such precision."""
    with LocalEngine(model, precision=precision) as engine:
        losses = [token_losses(engine, row.ids) for row in rows]
        answers = torch.cat([loss[row.answer_start - 1 :] for loss, row in zip(losses, rows, strict=True)])
        speeds = [BATCH * TOKENS / timed(partial(generate, engine, model, turn)) for turn in range(4)]
    return {
        "answer_perplexity": math.exp(answers.mean().item()),
        "text_perplexity": math.exp(torch.cat(losses).mean().item()),
        "tokens_per_second": sorted(speeds[1:])[1],
    }


def token_losses(engine: LocalEngine, ids: list[int]) -> torch.Tensor:
    """Negative log-likelihood of every token but the first, [tokens - 1], in fp64."""
    logits = engine.logits(ids)[:-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def generate(engine: LocalEngine, model: Path, turn: int) -> None:
    """One batch of random prompts to the full length."""
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=TOKENS, min_tokens=TOKENS)
    engine.generate(random_prompts(model, BATCH, PROMPT, turn), sampling)


if __name__ == "__main__":
    main()
