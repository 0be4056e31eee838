"""Training rows as token ids, made by the tokenizer that serves: what is trained is what will be prompted."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.text.supervision import Supervised, supervise, turn_end
from engine.text.tokenizer import Tokenizer
from services.store.models import Example

IGNORED = -100  # the label that torch's and TRL's losses skip


@dataclass(frozen=True)
class Row(Supervised):
    """One example as ids and labels."""

    example_id: str

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt, *self.answer, self.end]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt) + [*self.answer, self.end]


def make_rows(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Row]:
    """Raises ValueError when the template refuses a chat."""
    end = turn_end(tokenizer)
    made = [supervise(tokenizer, example.messages, example.completion or "", end) for example in examples]
    return [
        Row(prompt=row.prompt, answer=row.answer, end=row.end, example_id=str(example.id))
        for row, example in zip(made, examples, strict=True)
    ]
