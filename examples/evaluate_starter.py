"""Measure the starter model: base rules, house rules before learning, house rules after a LoRA on corrections.

    python -m examples.evaluate_starter [--model engine/starter] [--prompts 1000] [--corrections 400]

Scores are on held-out prompts, with 95 % Wilson intervals; corrections come from train-split prompts, where the
simulated reviewer corrects the model's own answers.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import islice
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from examples.grammars.common import Application, Example, stream
from examples.grammars.simulate import APPLICATIONS, review
from examples.starter_generate import greedy_answers
from examples.starter_lora import Recipe, train_lora, training_rows

Z_95 = 1.959964


class Share(NamedTuple):
    """A share of prompts with its 95 % Wilson interval."""

    good: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.good / self.total

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, **self._asdict()}


def wilson(good: int, total: int) -> Share:
    """Wilson score interval (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    share, square = good / total, Z_95**2 / total
    centre = (share + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * sqrt(share * (1 - share) / total + square / (4 * total))
    return Share(good, total, max(0.0, centre - half), min(1.0, centre + half))


def judged(answers: Sequence[str], examples: Sequence[Example], rule: Any) -> Share:  # noqa: ANN401 - a checker
    return wilson(sum(rule(e.messages, a) for e, a in zip(examples, answers, strict=True)), len(examples))


def corrections(
    application: Application,
    model: Any,  # noqa: ANN401 - a transformers model
    tokenizer: Tokenizer,
    count: int,
    seed: int,
) -> tuple[list[Example], list[str]]:
    """What a reviewer would have corrected among the model's own answers to `count` train-split prompts."""
    examples = list(islice(stream(application, "train", seed), count))
    answers = greedy_answers(model, tokenizer, [e.messages for e in examples])
    reviews = [review(application.name, e.messages, a) for e, a in zip(examples, answers, strict=True)]
    kept = [(e, r.correction) for e, r in zip(examples, reviews, strict=True) if r.correction is not None]
    return [e for e, _ in kept], [correction for _, correction in kept]


def evaluate(app: str, directory: Path, prompts: int, count: int, recipe: Recipe) -> dict[str, Any]:
    """Every figure of one application."""
    application = APPLICATIONS[app]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    examples = list(islice(stream(application, "held_out", recipe.seed + 1), prompts))
    conversations = [e.messages for e in examples]
    before = greedy_answers(model, tokenizer, conversations)
    corrected, texts = corrections(application, model, tokenizer, count, recipe.seed + 2)
    started = time.monotonic()
    with TemporaryDirectory() as work:
        adapted = train_lora(directory, training_rows([e.messages for e in corrected], texts), recipe, Path(work))
    seconds = time.monotonic() - started
    after = greedy_answers(adapted, tokenizer, conversations)
    return {
        "distinct_prompts": application.distinct_prompts(),
        "base_rules": judged(before, examples, application.base_ok).as_json(),
        "house_rules_before": judged(before, examples, application.house_ok).as_json(),
        "house_rules_after": judged(after, examples, application.house_ok).as_json(),
        "corrections": len(corrected),
        "lora_seconds": round(seconds, 1),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    header = f"{'application':12} {'base rules':24} {'house before':24} {'house after LoRA':24} corrections  LoRA s"
    lines = [header]
    for app, row in results.items():
        shares = [_share(row[key]) for key in ("base_rules", "house_rules_before", "house_rules_after")]
        cells = " ".join(f"{share!s:24}" for share in shares)
        lines.append(f"{app:12} {cells} {row['corrections']:11} {row['lora_seconds']:7.1f}")
    return "\n".join(lines)


def _share(fields: dict[str, float]) -> Share:
    return Share(int(fields["good"]), int(fields["total"]), fields["low"], fields["high"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the starter model before and after a LoRA.")
    parser.add_argument("--model", type=Path, default=Path("engine/starter"))
    parser.add_argument("--output", type=Path, help="where to write the JSON; nothing is written without it")
    parser.add_argument("--apps", nargs="+", default=list(APPLICATIONS), choices=list(APPLICATIONS))
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--corrections", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=Recipe().epochs)
    parser.add_argument("--learning-rate", type=float, default=Recipe().learning_rate)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = Recipe(epochs=options.epochs, learning_rate=options.learning_rate)
    results = {app: evaluate(app, options.model, options.prompts, options.corrections, recipe) for app in options.apps}
    print(table(results))
    if options.output:
        document = {"threads": options.threads, "recipe": recipe.as_json(), "applications": results}
        options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
