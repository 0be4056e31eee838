"""Training rows as token ids, made by the tokenizer that serves: what is trained is what will be prompted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.text.tokenizer import Tokenizer
from services.store.models import Example

IGNORED = -100  # the label that torch's and TRL's losses skip


@dataclass(frozen=True)
class Row:
    """One example: the prompt as the engine is given it, the answer, the end token, nothing after it."""

    example_id: str
    prompt: list[int]
    answer: list[int]
    end: int

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt, *self.answer, self.end]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt) + [*self.answer, self.end]


def turn_end(tokenizer: Tokenizer) -> int:
    """The token with which the template ends an answer. Raises ValueError unless the engine stops at it.

    Supervising anything else would teach the model to go on where the engine has stopped listening, or never to stop.
    """
    asked: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
    prompt = tokenizer.encode_chat(asked)
    whole = tokenizer.encode_chat([*asked, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
    said = [*prompt, *tokenizer.encode_plain("b")]
    if whole[: len(said)] != said:
        raise ValueError("the chat template writes a finished answer differently from the prompt that asks for it")
    after = whole[len(said) : len(said) + 1]
    if not after or after[0] not in tokenizer.eos_ids:
        raise ValueError(f"the chat template ends an answer with token {after}, at which the engine does not stop")
    return after[0]


def make_rows(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Row]:
    """Raises ValueError when the template refuses a chat."""
    end = turn_end(tokenizer)
    return [
        Row(
            example_id=str(example.id),
            prompt=tokenizer.encode_chat(example.messages),
            answer=tokenizer.encode_plain(example.completion or ""),
            end=end,
        )
        for example in examples
    ]
