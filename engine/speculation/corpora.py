"""What the suffix drafter remembers: one bounded corpus of answers per namespace, and one text per request.

A request drafts from its own prompt and answer and from its namespace's corpus, never from another's. C++ does it where
the native library is, with the same drafts; elsewhere the reference.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from engine.layers.sampler import Draw
from engine.messages import Corpus
from engine.native import suffix as fast
from engine.native.sampling import available
from engine.speculation import suffix
from engine.speculation.suffix import LONGEST, NOTHING, SEPARATOR, Ask, Proposal, Rivals

__all__ = ["LONGEST", "NOTHING", "Corpora", "Memory", "Proposal", "propose"]

# A request's own tokens that are searched; contexts are far shorter.
OWN_TOKENS = 1 << 20
FORGETTING = 0.98
# What all corpora may occupy together: beyond it the longest unused go.
CORPORA_BYTES = 512 << 20
# The reference takes 2 KB and 18 us a token: that must neither fill the memory nor hold up a step.
REFERENCE_TOKENS, REFERENCE_OWN_TOKENS = 1 << 15, 1 << 11


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
    """Who searches, in at most so many tokens of a request and of a corpus."""

    text: Callable[..., Any]
    propose: Callable[[Sequence[Ask]], list[Proposal]]
    own_tokens: int = OWN_TOKENS
    corpus_tokens: int = sys.maxsize


class Namespace:
    """What is kept of one: its corpus (None: nothing was learnt) and whether the verifier's noise helps there."""

    def __init__(self) -> None:
        self.text: Text | None = None
        # How much oftener, lately, the token came that the noise would have drafted than the one without.
        self.noise = 0.0

    def judge(self, rivals: Rivals, token: int) -> None:
        """`token` came where the two differed.

        Noise helps where answers really are random; where they follow from what is not seen here it only harms.
        """
        self.noise = FORGETTING * self.noise + (token == rivals.drawn) - (token == rivals.plain)

    def close(self) -> None:
        """Give its memory back."""
        if self.text is not None:
            self.text.close()


class Corpora:
    """The namespaces' corpora: at most `capacity` tokens each, separators included, `most` of them, and CORPORA_BYTES.

    The namespace that was longest without a request or an answer goes first. The reference holds fewer tokens than it
    is asked to. One thread.
    """

    def __init__(self, *, native: bool = True, capacity: int = 1 << 20, most: int = 64) -> None:
        if capacity < 1 or most < 1:
            raise ValueError("a corpus holds one token or more, and there is one or more")
        self.backend = _backend(native)
        self.capacity, self._most = min(capacity, self.backend.corpus_tokens), most
        self._namespaces: OrderedDict[str, Namespace] = OrderedDict()

    def open(self, namespace: str, prompt: Sequence[int]) -> "Memory":
        """A request's memory, which its owner closes. `prompt` is every token the request has by then."""
        self._touch(namespace)
        room = self.backend.own_tokens
        own = self.backend.text(room, own=True)
        own.extend(prompt if len(prompt) <= room else prompt[-room:])
        return Memory(self, namespace, own)

    def learn(self, namespace: str, tokens: Sequence[int]) -> None:
        """Add one answer, its end token included. Where memory runs out the corpus stays as small as it is."""
        if not tokens:
            return
        kept = self._touch(namespace)
        if kept.text is None:
            kept.text = self.backend.text(self.capacity, own=False)
        kept.text.extend([*tokens, SEPARATOR])
        self._fit()

    def forget(self, namespace: str) -> None:
        """Drop a namespace's corpus; requests in flight go on with their own text alone."""
        if (kept := self._namespaces.pop(namespace, None)) is not None:
            kept.close()

    def kept(self, namespace: str) -> Namespace | None:
        """What is kept of a namespace, valid until the next `learn`, `open` or `forget`."""
        return self._namespaces.get(namespace)

    def status(self) -> list[Corpus]:
        """Every corpus, the longest unused first; tokens include one separator an answer."""
        return [
            Corpus(namespace=name, tokens=len(kept.text), bytes=kept.text.bytes)
            for name, kept in self._namespaces.items()
            if kept.text is not None
        ]

    def _fit(self) -> None:
        """Drop the longest unused, never the one used last, until all fit."""
        while len(self._namespaces) > 1 and self._bytes() > CORPORA_BYTES:
            self._namespaces.popitem(last=False)[1].close()

    def _bytes(self) -> int:
        return sum(kept.text.bytes for kept in self._namespaces.values() if kept.text is not None)

    def _touch(self, namespace: str) -> Namespace:
        """The namespace, as the one used last; the longest unused makes room for a new one."""
        kept = self._namespaces.get(namespace)
        if kept is not None:
            self._namespaces.move_to_end(namespace)
            return kept
        if len(self._namespaces) >= self._most:
            self._namespaces.popitem(last=False)[1].close()
        kept = self._namespaces[namespace] = Namespace()
        return kept


class Memory:
    """What one request drafts from: its own prompt and answer, and whatever corpus its namespace has just then."""

    def __init__(self, corpora: Corpora, namespace: str, own: Text) -> None:
        self.corpora, self.namespace, self.own = corpora, namespace, own
        # Of the last proposal, until the next token is known.
        self.rivals: Rivals | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that were accepted, in order: the first is the one that the last proposal began with, or missed."""
        if self.rivals is not None and tokens:
            if (kept := self.corpora.kept(self.namespace)) is not None:
                kept.judge(self.rivals, tokens[0])
            self.rivals = None
        self.own.extend(tokens)

    def close(self) -> None:
        """The request ended."""
        self.own.close()


def propose(memories: Sequence[Memory], draws: Sequence[Draw | None], most: Sequence[int]) -> list[Proposal]:
    """One draft per memory, all of the same Corpora, of at most `most` tokens each (and LONGEST).

    A draw is that of the first drafted token. With a temperature the verifier's noise takes part in the votes where
    that was found to help; else, and always without one, what has the most votes is drafted.
    """
    if not memories:
        return []
    corpora = memories[0].corpora
    asks = []
    for memory, draw, wanted in zip(memories, draws, most, strict=True):
        kept = corpora.kept(memory.namespace)
        asks.append(
            Ask(memory.own, None, draw, wanted, False)
            if kept is None
            else Ask(memory.own, kept.text, draw, wanted, kept.noise > 0)
        )
    proposals = corpora.backend.propose(asks)
    for memory, proposal in zip(memories, proposals, strict=True):
        memory.rivals = proposal.rivals
    return proposals


def _backend(native: bool) -> Backend:
    if native and available():
        return Backend(fast.Text, fast.propose)
    return Backend(suffix.Text, suffix.propose, REFERENCE_OWN_TOKENS, REFERENCE_TOKENS)
