"""Training batches for the starter model: grammar examples as token ids, answers supervised up to the end token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.grammars.common import Application, Message, stream
from examples.starter_tokenizer import PAD, SPECIAL_TOKENS, TURN_END, TURN_START

BATCHES_PER_BUCKET = 8
COPIED_TOKENS = (4, 24)  # fewest and most tokens of a copying row


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one conversation; ids from `answer_start` on are the answer and its end token."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded ids [rows, length] and the flat positions whose next token is an answer token."""

    ids: Tensor
    positions: Tensor
    targets: Tensor


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there; raises ValueError when it is not."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}: it is not the starter model's")
    return found


def render_prompt(messages: Sequence[Message]) -> str:
    """The chat template's text for a prompt, generation prompt included (the template in Python, for speed)."""
    turns = "\n".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}" for m in messages)
    return f"{turns}\n{TURN_START}assistant\n"


def make_row(tokenizer: Tokenizer, messages: Sequence[Message], answer: str) -> Row:
    prompt = tokenizer.encode(render_prompt(messages)).ids
    return Row(prompt + tokenizer.encode(answer + TURN_END).ids, len(prompt))


def make_batch(rows: Sequence[Row], pad: int) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [pad] * (length - len(row.ids)) for row in rows])
    positions = [i * length + at - 1 for i, row in enumerate(rows) for at in range(row.answer_start, len(row.ids))]
    targets = [token for row in rows for token in row.ids[row.answer_start :]]
    return Batch(ids, torch.tensor(positions), torch.tensor(targets))


def batches(tokenizer: Tokenizer, application: Application, seed: int, size: int) -> Iterator[Batch]:
    """Endless base-answer batches of one application; rows of like length share a batch to save padding."""
    examples = stream(application, "train", seed)
    random = Random(f"batches/{application.name}/{seed}")
    pad = token_id(tokenizer, PAD)
    while True:
        drawn = list(islice(examples, size * BATCHES_PER_BUCKET))
        rows = sorted((make_row(tokenizer, e.messages, e.base) for e in drawn), key=lambda row: len(row.ids))
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        random.shuffle(groups)
        for group in groups:
            yield make_batch(group, pad)


def copying_batches(tokenizer: Tokenizer, seed: int, size: int) -> Iterator[Batch]:
    """Endless batches of random tokens to be repeated: the shortest way to the copying every application needs."""
    random = Random(f"copying/{seed}")
    special = {token_id(tokenizer, token) for token in SPECIAL_TOKENS}
    ordinary = [token for token in range(tokenizer.get_vocab_size()) if token not in special]
    start, end = token_id(tokenizer, TURN_START), token_id(tokenizer, TURN_END)
    pad = token_id(tokenizer, PAD)
    while True:
        rows = []
        for _ in range(size):
            said = random.sample(ordinary, random.randint(*COPIED_TOKENS))
            rows.append(Row([start, *said, end, *said, end], len(said) + 2))
        yield make_batch(rows, pad)
