"""The training mask of examples, as the trainer renders them with the tokenizer of the model this home serves."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.text.supervision import MaskPiece, asked_in, mask_pieces, supervise, turn_end
from services.console.tokens import TokenReader
from services.store.examples import served_at
from services.store.forms import is_supervised
from services.store.models import Example

PIECES_MOST = 600


class Mask(NamedTuple):
    """An example's tokens; `hidden` of them, at the beginning, are not shown. `refusal` says why there are none."""

    pieces: list[MaskPiece]
    learned: int
    hidden: int = 0
    refusal: str | None = None


def masks(reader: TokenReader, examples: Sequence[Example]) -> list[Mask]:
    """One for each example."""
    tokenizer = reader.tokenizer()
    if tokenizer is None:
        return [Mask([], 0, refusal="The model's tokenizer cannot be read here.") for _ in examples]
    try:
        end = turn_end(tokenizer)
    except ValueError as error:
        return [Mask([], 0, refusal=f"A run would be refused: {error}.") for _ in examples]
    made = []
    for example in examples:
        if not is_supervised(example):
            made.append(Mask([], 0, refusal="Not for supervised training: it says which answer is worse."))
            continue
        try:
            asked = asked_in(example.asked, served_at(example.interaction_id))
            row = supervise(tokenizer, example.messages, example.completion or "", end, asked)
        except ValueError as error:
            made.append(Mask([], 0, refusal=f"The template refuses this chat: {error}."))
            continue
        pieces = mask_pieces(tokenizer, row)
        made.append(Mask(pieces[-PIECES_MOST:], len(row.answer) + 1, max(0, len(pieces) - PIECES_MOST)))
    return made
