"""What a step's sampling costs, per kind of request: 16 rows, temperature 0.8, top-p 0.95. Milliseconds, medians.

    python -m benchmarks.sampling

Every row carries an answer of 200 tokens. `plain` needs no edits; the others add one thing each.
"""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch

from engine.grammar.compile import GrammarCompiler
from engine.layers import sampler
from engine.messages import Generate, Grammar, Sampling
from engine.runner.sampling import Place, accepted, draw_at
from engine.sequence import Sequence

ROWS, ANSWER, REPEATS = 16, 200, 101
TOKENIZER = Path(__file__).parents[1] / "engine" / "starter" / "tokenizer.json"
SCHEMA = '{"type":"object","properties":{"names":{"type":"array","items":{"type":"string"}}},"required":["names"]}'
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias of 100": {"logit_bias": dict.fromkeys(range(100), -1.0)},
    "top_logprobs 5": {"top_logprobs": 5},
    "grammar": {},
}


def places(kind: str, vocabulary: int) -> list[Place]:
    """Rows in the middle of their answers; those of `grammar` are inside a JSON string."""
    compiler = GrammarCompiler(TOKENIZER, vocabulary, [2])
    generator = random.Random(0)
    made = []
    for row in range(ROWS):
        sampling = Sampling(**({"seed": row, "max_tokens": 999, "temperature": 0.8, "top_p": 0.95} | KINDS[kind]))  # type: ignore[arg-type]
        prompt = generator.choices(range(vocabulary), k=300)
        sequence = Sequence(b"", Generate(id="", prompt=prompt, sampling=sampling), row, 9999)
        answer = generator.choices(range(100, 1000), k=ANSWER)
        if kind == "grammar":
            sequence.grammar = compiler.compile(Grammar(kind="json_schema", text=SCHEMA))
            answer = opening()
        for token in answer:
            sequence.accept(token, 0.0)
            accepted(sequence, token)
        made.append(Place(sequence))
    return made


def opening() -> list[int]:
    """The tokens of a JSON text's beginning."""
    ids: list[int] = tokenizers.Tokenizer.from_file(str(TOKENIZER)).encode('{"names": ["Ada", "Bo').ids
    return ids


def milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for vocabulary in (4096, 32000):
        logits = 2 * torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(0))
        draws = [place.draw for place in places("plain", vocabulary)]
        print(f"{vocabulary:6} torch sample alone  {milliseconds(lambda: sampler.sample(logits, draws)):7.3f}")  # noqa: B023
        for kind in KINDS:
            rows = places(kind, vocabulary)
            print(f"{vocabulary:6} {kind:19} {milliseconds(lambda: draw_at(rows, logits)):7.3f}")  # noqa: B023


if __name__ == "__main__":
    main()
