"""A grammar at work: which tokens may come next in one answer.

Suffixes: P places that are asked about, V the model's vocabulary (which may be larger than the tokenizer's).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray


class GrammarMatcher:
    """Follows one answer token by token. Not thread-safe: it belongs to the sequence it constrains.

    A stop token ends the answer wherever the grammar allows an end; it is never part of the text.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ended = False

    def copy(self) -> Self:
        """An independent matcher in the same state."""
        twin = type(self)(self._matcher.deep_copy(), self._vocab_size)
        twin._ended = self._ended
        return twin

    @property
    def complete(self) -> bool:
        """Whether nothing more may follow."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """Why this matcher can say nothing more, as a sentence; empty while it works."""
        return first_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def accept(self, token: int, stops: Collection[int] = ()) -> bool:
        """Take a token of the answer; False, and an error for ever, when the grammar does not admit it."""
        if token in stops:
            self._ended = True
            return True
        return self._matcher.consume_token(token)

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens; never more than were accepted."""
        if self._ended and count:
            self._ended = False
            count -= 1
        if count:
            assert self._matcher.rollback(count), "only accepted tokens are taken back"

    def validate(self, tokens: Sequence[int], stops: Collection[int] = ()) -> int:
        """How many of a draft's tokens would be admitted, in order. Nothing changes."""
        if self.complete or self.error:
            return 0
        end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        count = self._matcher.validate_tokens(list(tokens[:end]))
        if count < end or end == len(tokens):
            return count
        return count + int(self._accepting_behind(tokens[:end]))

    def mask_(self, logits_V: torch.Tensor, stops: Collection[int] = ()) -> str:
        """Minus infinity on every token that may not come next; why there is none, empty when there is one."""
        return mask_(logits_V[None], [Lookahead(0, self, (), stops, False)]).get(0, "")

    def bits(self, drafted: Sequence[int], stops: Collection[int], words: NDArray[np.int32]) -> bool | None:
        """Write the tokens admitted behind a draft as bits; whether the answer may end there.

        None when the draft is not admitted: nothing said about what follows it would mean anything.
        """
        if any(token in stops for token in drafted):
            return None
        taken = self._matcher.try_consume_tokens(list(drafted)) if drafted else 0
        ends = None
        if taken == len(drafted):
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            ends = self._matcher.is_accepting()
        if taken and not self._matcher.is_error():
            self._matcher.rollback(taken)
        return ends

    @property
    def words(self) -> int:
        """32-bit words of one mask."""
        return (self._vocab_size + 31) // 32

    def _accepting_behind(self, tokens: Sequence[int]) -> bool:
        taken = self._matcher.try_consume_tokens(list(tokens))
        accepting = self._matcher.is_accepting()
        if taken:
            self._matcher.rollback(taken)
        return accepting


class Lookahead(NamedTuple):
    """One row of logits and the grammar that constrains it, `drafted` tokens ahead of what was accepted.

    `early` asks for no stop yet; where the grammar allows nothing else, the grammar wins.
    """

    row: int
    matcher: GrammarMatcher
    drafted: Sequence[int]
    stops: Collection[int]
    early: bool


def mask_(logits_PV: torch.Tensor, looks: Sequence[Lookahead]) -> dict[int, str]:
    """Minus infinity on every token the grammars do not admit, for all rows at once.

    Rows without a grammar, or behind a draft that is not admitted, stay as they are. Returns why, for each row that has
    no token left or whose grammar cannot go on.
    """
    if not looks:
        return {}
    problems = {}
    allowed_PV = np.ones(logits_PV.shape, dtype=np.bool_)
    for look in looks:
        allowed = _allowed(look, logits_PV.shape[1])
        if allowed is None:
            continue
        if look.matcher.error or not allowed.any():
            problems[look.row] = f"the grammar cannot go on: {look.matcher.error or 'it admits no token here'}"
        else:
            allowed_PV[look.row] = allowed
    logits_PV.masked_fill_(torch.from_numpy(~allowed_PV).to(logits_PV.device), float("-inf"))
    return problems


def _allowed(look: Lookahead, vocabulary: int) -> NDArray[np.bool_] | None:
    words = np.zeros(look.matcher.words, dtype=np.int32)
    ends = look.matcher.bits(look.drafted, look.stops, words)
    if ends is None:
        return None
    bits = np.unpackbits(words.view(np.uint8), count=min(vocabulary, 32 * len(words)), bitorder="little")
    allowed = np.zeros(vocabulary, dtype=np.bool_)
    allowed[: len(bits)] = bits
    stops = [token for token in look.stops if 0 <= token < vocabulary]
    if ends:
        allowed[stops] = True
    if look.early:
        later = allowed.copy()
        later[stops] = False
        return later if later.any() else allowed
    return allowed


def first_line(error: str) -> str:
    """The part of llguidance's report that is for people; its state dump follows."""
    return next((line.strip() for line in error.splitlines() if line.strip()), "unknown error")
