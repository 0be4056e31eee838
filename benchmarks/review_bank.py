"""What is said in the large world: different answers of each application, drawn once, with what a row needs."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.progress import Progress

from benchmarks.figures import STARTER
from engine.text.tokenizer import Tokenizer
from examples.grammars.common import Example, stream
from examples.grammars.simulate import APPLICATIONS, review

DIMENSIONS = 256


class Said(NamedTuple):
    """One answer of the bank with what a row needs: ids as JSON, ready for COPY."""

    app: str
    messages: list[dict[str, str]]
    text: str
    prompt_ids: str
    output: str
    output_ids: str
    prompt_tokens: int
    tokens: int
    vector: str
    corrected: str | None


class Bank:
    """Distinct answers of each application, drawn from its grammar once and then again and again."""

    def __init__(self, seed: int, counts: Mapping[str, int], progress: Progress) -> None:
        self.tokenizer = Tokenizer.load(STARTER)
        self._words = np.random.default_rng(seed).standard_normal((4096, DIMENSIONS)).astype(np.float32)
        task = progress.add_task("answers", total=sum(counts.values()))
        self.said: dict[str, list[Said]] = {}
        for app, count in counts.items():
            examples = stream(APPLICATIONS[app], "train", seed)
            dice = random.Random(f"{seed}/{app}")
            self.said[app] = []
            for _ in range(count):
                self.said[app].append(self._made(next(examples), dice))
                progress.advance(task)

    def _made(self, example: Example, dice: random.Random) -> Said:
        output = example.house if dice.random() < 0.2 else example.base
        prompt = self.tokenizer.encode_chat(list(example.messages))
        answer = self.tokenizer.encode_plain(output)
        text = json.dumps(example.messages, ensure_ascii=False)
        corrected = review(example.app, example.messages, output).correction
        vector = self._vector(prompt + answer)
        return Said(
            example.app, example.messages, text, json.dumps(prompt), output, json.dumps(answer), len(prompt),
            len(answer), vector, corrected,
        )  # fmt: skip

    def _vector(self, ids: Sequence[int]) -> str:
        total = self._words[np.asarray(ids) % len(self._words)].sum(axis=0)
        unit = total / max(float(np.linalg.norm(total)), 1e-9)
        return "[" + ",".join(f"{value:.4f}" for value in unit.tolist()) + "]"
