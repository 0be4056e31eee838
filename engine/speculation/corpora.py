"""What the suffix drafter remembers: one bounded corpus of answers per namespace, and one text per request.

A request drafts from its own prompt and answer and from its namespace's corpus, never from another's. C++ does it where
the native library is, with the same drafts; elsewhere the reference.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from engine.layers.sampler import Draw
from engine.messages import Corpus
from engine.native import suffix as fast
from engine.native.sampling import available
from engine.speculation import suffix
from engine.speculation.suffix import LONGEST, NOTHING, SEPARATOR, Proposal

__all__ = ["LONGEST", "NOTHING", "Corpora", "Memory", "Proposal", "propose"]

# A request's own tokens that are searched; contexts are far shorter.
OWN_TOKENS = 1 << 20


class Text(Protocol):
    """The newest tokens of a text, searchable: engine.speculation.suffix.Text, or its twin in C++."""

    def __len__(self) -> int: ...

    @property
    def bytes(self) -> int:
        """What it occupies now."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end; the oldest go where there is no room."""

    def close(self) -> None:
        """Give its memory back; it is not used again."""


class Backend(NamedTuple):
    """Who searches."""

    text: Callable[..., Any]
    propose: Callable[[Sequence[Any], Sequence[Any], Sequence[Draw | None], Sequence[int]], list[Proposal]]


class Corpora:
    """The namespaces' corpora: at most `capacity` tokens each, separators included, and `most` of them.

    The namespace that was longest without a request or an answer goes first. One thread.
    """

    def __init__(self, *, native: bool = True, capacity: int = 1 << 20, most: int = 64) -> None:
        if capacity < 1 or most < 1:
            raise ValueError("a corpus holds one token or more, and there is one or more")
        self._capacity, self._most = capacity, most
        self.backend = _backend(native)
        self._texts: OrderedDict[str, Text] = OrderedDict()

    def open(self, namespace: str, prompt: Sequence[int]) -> "Memory":
        """A request's memory, which its owner closes. `prompt` is every token the request has by then."""
        self._touch(namespace)
        own = self.backend.text(OWN_TOKENS, own=True)
        own.extend(prompt)
        return Memory(self, namespace, own)

    def learn(self, namespace: str, tokens: Sequence[int]) -> None:
        """Add one answer, its end token included. Where memory runs out the corpus stays as small as it is."""
        if not tokens:
            return
        text = self._texts.get(namespace)
        if text is None:
            text = self._texts[namespace] = self.backend.text(self._capacity, own=False)
            if len(self._texts) > self._most:
                self._texts.popitem(last=False)[1].close()
        self._touch(namespace)
        text.extend([*tokens, SEPARATOR])

    def forget(self, namespace: str) -> None:
        """Drop a namespace's corpus; requests in flight go on with their own text alone."""
        if (text := self._texts.pop(namespace, None)) is not None:
            text.close()

    def corpus(self, namespace: str) -> Text | None:
        """The corpus as it is now, valid until the next `learn` or `forget`; None where nothing was learnt."""
        return self._texts.get(namespace)

    def status(self) -> list[Corpus]:
        """Every corpus, the longest unused first; tokens include one separator an answer."""
        return [Corpus(namespace=name, tokens=len(text), bytes=text.bytes) for name, text in self._texts.items()]

    def _touch(self, namespace: str) -> None:
        if namespace in self._texts:
            self._texts.move_to_end(namespace)


class Memory:
    """What one request drafts from: its own prompt and answer, and whatever corpus its namespace has just then."""

    def __init__(self, corpora: Corpora, namespace: str, own: Text) -> None:
        self.corpora, self.namespace, self.own = corpora, namespace, own

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that were accepted, in order."""
        self.own.extend(tokens)

    def close(self) -> None:
        """The request ended."""
        self.own.close()


def propose(memories: Sequence[Memory], draws: Sequence[Draw | None], most: Sequence[int]) -> list[Proposal]:
    """One draft per memory, all of the same Corpora, of at most `most` tokens each (and LONGEST).

    A draw is that of the first drafted token; with a temperature the draft is drawn with the verifier's noise. None, or
    temperature 0, drafts what had the most votes.
    """
    if not memories:
        return []
    corpora = memories[0].corpora
    texts = [corpora.corpus(memory.namespace) for memory in memories]
    return corpora.backend.propose([memory.own for memory in memories], texts, draws, most)


def _backend(native: bool) -> Backend:
    if native and available():
        return Backend(fast.Text, fast.propose)
    return Backend(suffix.Text, suffix.propose)
