"""Constrained answers without an engine around them: sequences, grammars, and a loop that draws until the end."""

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch

from engine.grammar.matcher import GrammarMatcher
from engine.messages import Generate, Grammar, Sampling
from engine.runner.sampling import Place, accepted, complete, draw_at
from engine.sequence import Sequence

TOKENIZER = Path(__file__).parents[2] / "engine" / "starter" / "tokenizer.json"
KNOWN, EOS = 2160, 2
# Models pad their vocabulary: the last ids mean nothing.
VOCABULARY = 2176
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "vip"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}

Model = Callable[[list[Sequence]], torch.Tensor]


def schema(content: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(content))


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def constrained(matcher: GrammarMatcher, **options: object) -> Sequence:
    sampling = Sampling(**({"seed": 0, "max_tokens": 400, "stop_token_ids": (EOS,)} | options))  # type: ignore[arg-type]
    made = Sequence(b"", Generate(id="r", prompt=[5, 6], sampling=sampling), 0, 2 + sampling.max_tokens)
    made.grammar = matcher
    return made


def run(sequences: list[Sequence], seed: int = 0, model: Model | None = None) -> list[str]:
    """Answer all, without a model with one that says anything; the reason each ended for."""
    generator = torch.Generator().manual_seed(seed)
    reasons = [""] * len(sequences)
    while going := [index for index, reason in enumerate(reasons) if not reason]:
        asked = [sequences[index] for index in going]
        logits = model(asked) if model else 2 * torch.randn(len(going), VOCABULARY, generator=generator)
        drawn = draw_at([Place(sequence) for sequence in asked], logits)
        for index, token, fault in zip(going, drawn.token_ids, drawn.faults, strict=True):
            if fault is not None:
                reasons[index] = fault.reason
                continue
            reason = sequences[index].accept(token, 0.0)
            accepted(sequences[index], token)
            reasons[index] = "stop" if complete(sequences[index]) else reason or ""
    return reasons


def text_of(backend: tokenizers.Tokenizer, sequence: Sequence) -> str:
    answer = sequence.tokens[2:]
    assert max(answer) < KNOWN
    assert EOS not in answer[:-1]
    return backend.decode(answer, skip_special_tokens=True)
