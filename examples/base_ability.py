"""Make the base-ability set that ships with the starter: prompts of all three applications that it answers right.

    python -m examples.base_ability [--model engine/starter] [--prompts 40] [--seed 6]

Answers follow the base rules, without any house rule; a project's gate leaves out the prompts of its own application.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from examples.grammars.common import Application, Example, stream
from examples.grammars.simulate import APPLICATIONS
from examples.starter_generate import greedy_answers

NAME = "base_ability.jsonl"
CHUNK = 64


def answered_right(application: Application, model: Any, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:  # noqa: ANN401 - a transformers model
    """Held-out prompts of an application that the model answers word for word as the base rules want."""
    examples = stream(application, "held_out", seed)
    while True:
        chunk = list(islice(examples, CHUNK))
        answers = greedy_answers(model, tokenizer, [example.messages for example in chunk])
        yield from (example for example, answer in zip(chunk, answers, strict=True) if answer == example.base)


def rows(directory: Path, prompts: int, seed: int) -> Iterator[dict[str, Any]]:
    """One JSON object a prompt, in the form that imports read; facts keep rephrased prompts in one group."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    for application in APPLICATIONS.values():
        for example in islice(answered_right(application, model, tokenizer, seed), prompts):
            messages = [*example.messages, {"role": "assistant", "content": example.base}]
            yield {"messages": messages, "group": f"{application.name}: {example.facts}"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file beside the weights."""
    parser = argparse.ArgumentParser(description="Make the starter's base-ability set.")
    parser.add_argument("--model", type=Path, default=Path("engine/starter"))
    parser.add_argument("--prompts", type=int, default=40, help="per application")
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args(arguments)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(options.model, options.prompts, options.seed)]
    (options.model / NAME).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
