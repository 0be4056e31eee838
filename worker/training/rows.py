"""Training rows as token ids, made by the tokenizer that serves: what is trained is what will be prompted.

One class a kind of run. Each writes the columns that TRL's own collator reads, so no text reaches the trainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from uuid import UUID

from engine.text.supervision import Asked, Supervised, answer_ids, asked_in, prompt_ids, supervise, turn_end
from engine.text.tokenizer import Tokenizer
from services.store.examples import beside, served_at
from services.store.forms import is_supervised, rows_of
from services.store.models import Example, InteractionBody

IGNORED = -100  # the label that torch's and TRL's losses skip
Bodies = Mapping[UUID, InteractionBody]


@dataclass(frozen=True)
class Row(Supervised):
    """One right answer as ids and labels."""

    example_id: str

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt, *self.answer, self.end]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt) + [*self.answer, self.end]

    @property
    def answers(self) -> list[list[int]]:
        """What is learned from, each with its end token."""
        return [[*self.answer, self.end]]

    def columns(self) -> dict[str, Any]:
        """As SFTTrainer's collator takes it."""
        return {"input_ids": self.input_ids, "labels": self.labels}

    def validation(self) -> dict[str, Any]:
        return {"prompt_ids": self.prompt, "good_ids": self.answers[0]}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better first; both end with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    example_id: str

    @property
    def answers(self) -> list[list[int]]:
        """What is learned from, each with its end token."""
        return [self.chosen, self.rejected]

    def columns(self) -> dict[str, Any]:
        """As DPOTrainer's collator takes it."""
        return {"prompt_ids": self.prompt, "chosen_ids": self.chosen, "rejected_ids": self.rejected}

    def validation(self) -> dict[str, Any]:
        return {"prompt_ids": self.prompt, "good_ids": self.chosen, "bad_ids": self.rejected}


@dataclass(frozen=True)
class Marked:
    """One answer that was marked right or wrong; it ends with the end token."""

    prompt: list[int]
    completion: list[int]
    good: bool
    example_id: str

    @property
    def answers(self) -> list[list[int]]:
        """What is learned from, each with its end token."""
        return [self.completion]

    def columns(self) -> dict[str, Any]:
        """As KTOTrainer's collator takes it; `paired` adds the mismatched answers."""
        return {"prompt_ids": self.prompt, "completion_ids": self.completion, "label": self.good}

    def validation(self) -> dict[str, Any]:
        return {"prompt_ids": self.prompt, "good_ids" if self.good else "bad_ids": self.completion}


AnyRow = Row | Pair | Marked


def usable(kind: str, example: Example) -> bool:
    """Whether an example has something to say to a run of this kind."""
    if kind == "dpo":
        return bool(rows_of(example, "preference"))
    if kind == "kto":
        return bool(rows_of(example, "unpaired"))
    return is_supervised(example)


def make_rows(
    tokenizer: Tokenizer, examples: Sequence[Example], bodies: Bodies | None = None, kind: str = "sft"
) -> list[AnyRow]:
    """Rows of a kind's usable examples, in their order. `bodies` are logged originals.

    Raises ValueError when the template refuses a chat.
    """
    end = turn_end(tokenizer)
    known = bodies or {}
    return [row for example in examples for row in _rows(kind, tokenizer, example, end, asked_of(example, known))]


def asked_of(example: Example, bodies: Bodies) -> Asked:
    """What the example's request said beside its messages; when it came is in its id. Examples of older releases kept
    nothing of it: there it is read from the log while that has it."""
    body = bodies.get(example.interaction_id) if example.interaction_id else None
    kept = example.asked or beside(body.parameters if body is not None else None)
    return asked_in(kept, served_at(example.interaction_id))


def _rows(kind: str, tokenizer: Tokenizer, example: Example, end: int, asked: Asked) -> list[AnyRow]:
    good, bad, name = example.completion, example.rejected, str(example.id)
    if kind == "sft":
        row = supervise(tokenizer, example.messages, good or "", end, asked)
        return [Row(prompt=row.prompt, answer=row.answer, end=end, example_id=name)]
    prompt = prompt_ids(tokenizer, example.messages, asked)
    said = [
        (mark, [*answer_ids(tokenizer, text, asked), end]) for text, mark in ((good, True), (bad, False))
        if text is not None
    ]  # fmt: skip
    if kind == "kto":
        return [Marked(prompt, ids, mark, name) for mark, ids in said]
    (_, chosen), (_, rejected) = said
    return [Pair(prompt, chosen, rejected, name)]


def arranged(rows: Sequence[AnyRow], seed: int, batch_size: int) -> list[dict[str, Any]]:
    """The columns to train on, shuffled by `seed`. KTO's trainer takes them in this order and compares each prompt with
    the answer to another prompt of its batch, as TRL's own preparation does."""
    mixed = list(rows)
    Random(seed).shuffle(mixed)
    columns = [row.columns() for row in mixed]
    if not mixed or not isinstance(mixed[0], Marked):
        return columns
    for start in range(0, len(columns), batch_size):
        batch = columns[start : start + batch_size]
        answers = [one["completion_ids"] for one in batch]
        if len(batch) == 1:  # alone in the last batch it would be compared with itself
            answers = [columns[0]["completion_ids"]]
        for one, other in zip(batch, answers[-1:] + answers[:-1], strict=True):
            one["KL_completion_ids"] = other
    return columns
