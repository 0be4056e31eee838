"""Average the weights of two training runs of the starter model, one of which continued the other.

    python -m examples.average_starter RUN_A RUN_B --output DIR

Both ends of a short run that restarts with a high learning rate lie around a better point than either (Izmailov et al.
2018, "Averaging Weights Leads to Wider Optima and Better Generalization").
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from examples.starter_model import save_starter


def average(first: LlamaForCausalLM, second: LlamaForCausalLM) -> LlamaForCausalLM:
    """`first` with its weights replaced by the mean of both; raises ValueError when the shapes differ."""
    others = second.state_dict()
    with torch.no_grad():
        for name, weight in first.named_parameters():  # tied weights come once, as they must
            if name not in others or others[name].shape != weight.shape:
                raise ValueError(f"cannot average: {name} is not of the same shape in both runs")
            weight.copy_((weight + others[name]) / 2)
    return first


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Average two runs of the starter model.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    models = [LlamaForCausalLM.from_pretrained(path, dtype="float32") for path in (options.first, options.second)]
    save_starter(average(*models), Tokenizer.from_file(str(options.first / "tokenizer.json")), options.output)


if __name__ == "__main__":
    main()
