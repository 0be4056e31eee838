"""Token ids to text as they arrive, never splitting a character."""

import codecs
from collections.abc import Callable, Container

import tokenizers

REPLACEMENT = "\ufffd"
# A character takes at most 4 bytes; this many tokens without a clean end are noise, not an unfinished character.
NOISE_TOKENS = 64


class ByteDetokenizer:
    """Detokenizer for byte-level tokenizers: the same text, without asking the tokenizer for each token.

    `spell` gives a token's bytes; the ids in `silent` show nothing.
    """

    def __init__(self, spell: Callable[[int], bytes], silent: Container[int]) -> None:
        self._spell = spell
        self._silent = silent
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        return "" if token_id in self._silent else self._decoder.decode(self._spell(token_id))

    def flush(self) -> str:
        """What was held back, as U+FFFD when the stream ended inside a character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class Detokenizer:
    """Incremental decoding: of tokens that spell valid UTF-8, all deltas plus `flush()` equal decoding them at once.

    The last cleanly ended tokens stay as context, since a token's text may depend on its left neighbour (SentencePiece
    spaces). An unfinished UTF-8 character decodes to one U+FFFD at the end, or to one for each of its bytes (byte
    fallback, which gives up a whole run of bytes at once): they are held back.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._context: list[int] = []
        self._context_length = 0
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._pending.append(token_id)
        text = self._decode()
        certain = text.rstrip(REPLACEMENT)
        whole = certain == text
        delta = self._emit(certain)
        if whole or len(self._pending) > NOISE_TOKENS:
            if not whole:
                delta += self._emit(text)
            self._start_again()
        return delta

    def flush(self) -> str:
        """What was held back, as U+FFFD when the stream ended inside a character."""
        delta = self._emit(self._decode())
        self._start_again()
        return delta

    def _decode(self) -> str:
        text: str = self._backend.decode(self._context + self._pending, skip_special_tokens=True)
        return text[self._context_length :]

    def _emit(self, text: str) -> str:
        delta = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return delta

    def _start_again(self) -> None:
        self._context, self._pending, self._emitted = self._pending or self._context, [], 0
        self._context_length = len(self._backend.decode(self._context, skip_special_tokens=True))
