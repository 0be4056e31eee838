"""A grammar at work: which tokens may come next in one answer.

Suffixes: P places that are asked about, V the model's vocabulary (which may be larger than the tokenizer's).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray

Words = NDArray[np.uint32]
ALL = np.uint32(0xFFFFFFFF)


class GrammarMatcher:
    """Follows one answer token by token. Not thread-safe: it belongs to the sequence it constrains.

    A stop token ends the answer wherever the grammar allows an end; it is never part of the text.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ended = False
        # An unadmitted token was accepted: whoever draws has not asked for the mask.
        self.rejected = False

    def copy(self) -> Self:
        """An independent matcher in the same state."""
        twin = type(self)(self._matcher.deep_copy(), self._vocab_size)
        twin._ended = self._ended
        return twin

    @property
    def words(self) -> int:
        """32-bit words of one mask."""
        return (self._vocab_size + 31) // 32

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
        return summary(self._matcher.get_error()) if self._matcher.is_error() else ""

    def accept(self, token: int, stops: Collection[int] = ()) -> bool:
        """Take a token of the answer; False, and an error for ever, when the grammar does not admit it."""
        if token in stops:
            self._ended = True
            return True
        self.rejected = not self._matcher.consume_token(token)
        return not self.rejected

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
        odd = (place for place, token in enumerate(tokens) if token in stops or not self._knows(token))
        end = next(odd, len(tokens))
        count = self._matcher.validate_tokens(list(tokens[:end]))
        if count < end or end == len(tokens) or tokens[end] not in stops:
            return count
        return count + int(self._accepting_behind(tokens[:end]))

    def mask_(self, logits_V: torch.Tensor, stops: Collection[int] = ()) -> str:
        """Minus infinity on every token that may not come next; why there is none, empty when there is one."""
        return mask_(logits_V[None], [Lookahead(0, self, (), stops, False)]).get(0, "")

    def fill(
        self, words_W: Words, drafted: Sequence[int] = (), stops: Collection[int] = (), early: bool = False
    ) -> bool:
        """Write the tokens admitted behind a draft as bits, token 0 lowest, and take the draft back.

        False when the draft is not admitted: nothing said about what follows it would mean anything. `early` asks for
        no stop yet; where nothing else is admitted, the grammar wins.
        """
        if not all(map(self._knows, drafted)):
            return False
        taken = self._matcher.try_consume_tokens(list(drafted)) if drafted else 0
        if taken == len(drafted):
            self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
            _edit_stops(words_W, stops, admitted=self.accepting, early=early)
        if taken:
            self._matcher.rollback(taken)
        return taken == len(drafted)

    def _knows(self, token: int) -> bool:
        """Models pad their vocabulary; only to be asked about such an id is an error for ever."""
        return 0 <= token < self._vocab_size

    def _accepting_behind(self, tokens: Sequence[int]) -> bool:
        taken = self._matcher.try_consume_tokens(list(tokens))
        accepting = self._matcher.is_accepting()
        if taken:
            self._matcher.rollback(taken)
        return accepting


class Lookahead(NamedTuple):
    """One row of logits and the grammar that constrains it, `drafted` tokens ahead of what was accepted."""

    row: int
    matcher: GrammarMatcher
    drafted: Sequence[int]
    stops: Collection[int]
    early: bool


def mask_(logits_RV: torch.Tensor, looks: Sequence[Lookahead]) -> dict[int, str]:
    """Minus infinity on every token the grammars do not admit, for all rows at once.

    Rows without a grammar, or behind a draft that is not admitted, stay as they are. Returns why, for each row that has
    no token left, whose draft is not admitted or whose grammar cannot go on. All matchers must be of one tokenizer.
    """
    if not looks:
        return {}
    words_PW = np.zeros((len(looks), looks[0].matcher.words), dtype=np.uint32)
    astray = set()
    for look, words_W in zip(looks, words_PW, strict=True):
        if not look.matcher.fill(words_W, look.drafted, look.stops, look.early):
            words_W.fill(ALL)
            astray.add(look.row)
    allowed_PV = unpack(words_PW, logits_RV.shape[1])
    forbidden_PV = torch.from_numpy(~allowed_PV).to(logits_RV.device)
    if len(looks) == len(logits_RV):
        logits_RV.masked_fill_(forbidden_PV, float("-inf"))
    else:
        rows_P = torch.tensor([look.row for look in looks], device=logits_RV.device)
        logits_RV.index_copy_(0, rows_P, logits_RV.index_select(0, rows_P).masked_fill_(forbidden_PV, float("-inf")))
    problems = dict.fromkeys(astray, "the draft is not admitted")
    for look, allowed_V in zip(looks, allowed_PV, strict=True):
        if look.matcher.error or not allowed_V.any():
            problems[look.row] = f"the grammar cannot go on: {look.matcher.error or 'it admits no token here'}"
    return problems


def _edit_stops(words_W: Words, stops: Collection[int], *, admitted: bool, early: bool) -> None:
    """Admit stops where the answer may end; take them away where it is too early, unless nothing else is left."""
    places = [(token >> 5, np.uint32(1 << (token & 31))) for token in stops if 0 <= token < 32 * len(words_W)]
    if admitted:
        for word, bit in places:
            words_W[word] |= bit
    if early:
        later_W = words_W.copy()
        for word, bit in places:
            later_W[word] &= ~bit
        if later_W.any():
            words_W[:] = later_W


def unpack(words_PW: Words, vocabulary: int) -> NDArray[np.bool_]:
    """Bits to booleans; ids beyond the tokenizer's are never allowed."""
    known = min(vocabulary, 32 * words_PW.shape[1])
    bits = np.unpackbits(words_PW.view(np.uint8), axis=1, count=known, bitorder="little").view(np.bool_)
    return np.pad(bits, ((0, 0), (0, vocabulary - known))) if known < vocabulary else bits


def summary(report: str) -> str:
    """llguidance's report as one line of bounded length, without the state dump that may follow it."""
    line = " ".join(report.split("<state>")[0].replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else f"{line[:100]} … {line[-190:]}"
