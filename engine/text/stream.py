"""One completion's tokens to the text its client sees."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from engine.text.detokenizer import ByteDetokenizer, Detokenizer
from engine.text.stops import StopStrings
from engine.text.tokenizer import Tokenizer

NOTHING: Mapping[int, str] = MappingProxyType({})


def make_detokenizer(tokenizer: Tokenizer) -> Detokenizer | ByteDetokenizer:
    """The cheapest that gives the tokenizer's own text."""
    if tokenizer.byte_level:
        return ByteDetokenizer(tokenizer.token_bytes, tokenizer.special_ids)
    return Detokenizer(tokenizer.backend)


class TextStream:
    """Detokenizer and stop strings together. One per choice; end it with `flush()`.

    `stopped` is the stop string found, if any: the caller then cancels the request. `consumed` counts the tokens that
    went into the shown text and the stop string; the engine may have sent some beyond it. `ends` are further tokens
    that show nothing, `spell` control tokens that show what it says. Stop strings count only after `min_tokens`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        ends: Iterable[int] = (),
        min_tokens: int = 0,
        spell: Mapping[int, str] = NOTHING,
    ) -> None:
        self.ends = frozenset(tokenizer.eos_ids) | frozenset(ends)
        self._min_tokens = min_tokens
        self._spell = spell
        self._detokenizer = make_detokenizer(tokenizer)
        self._stops = StopStrings(stop)
        self.consumed = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stops.stopped

    def push(self, token_ids: Iterable[int]) -> str:
        """The text these tokens make certain. End-of-sequence tokens count but show nothing."""
        shown: list[str] = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.consumed += 1
            if token_id not in self.ends:
                text = self._text(token_id)
                shown.append(text if self.consumed <= self._min_tokens else self._stops.push(text).text)
        return "".join(shown)

    def _text(self, token_id: int) -> str:
        spelled = self._spell.get(token_id)
        return self._detokenizer.push(token_id) if spelled is None else self._detokenizer.flush() + spelled

    def flush(self) -> str:
        """The rest: an unfinished character, text held for a stop string that never came. Empty after a stop."""
        if self.stopped is not None:
            return ""
        return self._stops.push(self._detokenizer.flush()).text + self._stops.flush()
