"""One completion's tokens to the text its client sees."""

from collections.abc import Iterable, Sequence

from engine.text.detokenizer import Detokenizer
from engine.text.stops import StopStrings
from engine.text.tokenizer import Tokenizer


class TextStream:
    """Detokenizer and stop strings together. One per choice; end it with `flush()`.

    `stopped` is the stop string found, if any: the caller then cancels the request. `consumed` counts the tokens that
    went into the shown text and the stop string; the engine may have sent some beyond it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._ends = frozenset(tokenizer.eos_ids)
        self._detokenizer = Detokenizer(tokenizer.backend)
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
            if token_id not in self._ends:
                shown.append(self._stops.push(self._detokenizer.push(token_id)).text)
        return "".join(shown)

    def flush(self) -> str:
        """The rest: an unfinished character, text held for a stop string that never came. Empty after a stop."""
        if self.stopped is not None:
            return ""
        return self._stops.push(self._detokenizer.flush()).text + self._stops.flush()
