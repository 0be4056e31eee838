"""Turbo-0 in plain Python: drafts what followed the last tokens before, in this request and in its namespace's answers.

The reference that engine/native/suffix.h is tested against, and what drafts where that cannot be built. No training:
where the last 4 tokens (else the last 2) stood before, those places vote on what comes next, token after token.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from engine.layers.sampler import GOLDEN, MASK, MIX_1, MIX_2, Draw, _row_key

# Stands between two answers; no draft crosses it.
SEPARATOR = -1
# What the index finds: places behind the same 4 tokens, or the same 2.
LONG, SHORT = 4, 2
# The most places that vote (newest first), the most tokens of a match that are counted, the longest draft.
WALK, REACH, LONGEST = 32, 32, 64


class Proposal(NamedTuple):
    """A draft. `match` is how many tokens before it were found again (0: nothing was, and there is no draft).

    `shares[i]` is the part of the votes that `tokens[i]` had among the places that agree with the draft before it.
    """

    tokens: list[int]
    match: int
    shares: list[float]


NOTHING = Proposal([], 0, [])


class Text:
    """The newest `capacity` tokens of a text, and at which positions each of their 4 and 2 in a row end.

    A position counts all tokens ever added; position p is the place before token p.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ring: list[int] = []
        self._ends: dict[tuple[int, ...], deque[int]] = {}
        self.end = 0

    def __len__(self) -> int:
        return len(self._ring)

    def __getitem__(self, position: int) -> int:
        return self._ring[position % self._capacity]

    @property
    def start(self) -> int:
        """The oldest position whose token is still here."""
        return self.end - len(self._ring)

    @property
    def bytes(self) -> int:
        """About what it occupies: per token its own four bytes and two places in lists and dictionaries."""
        return len(self._ring) * (4 + 2 * 64)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end; the oldest go where there is no room."""
        for token in tokens:
            self._append(token)

    def close(self) -> None:
        """Drop everything."""
        self._ring, self._ends, self.end = [], {}, 0

    def tail(self, count: int) -> list[int]:
        """The last `count` tokens, or all there are."""
        return [self[position] for position in range(max(self.start, self.end - count), self.end)]

    def places(self, context: Sequence[int]) -> Iterator[int]:
        """Positions behind `context`, newest first, where a token follows."""
        ends = self._ends.get(tuple(context), ())
        return (end for end in reversed(ends) if end < self.end and self[end] != SEPARATOR)

    def match(self, position: int, context: Sequence[int]) -> int:
        """How many tokens before `position` are those at the end of `context`."""
        length = 0
        while (
            length < len(context)
            and position - length > self.start
            and self[position - length - 1] == context[-length - 1]
        ):
            length += 1
        return length

    def _append(self, token: int) -> None:
        if len(self._ring) < self._capacity:
            self._ring.append(token)
        else:
            self._lose_oldest()
            self._ring[self.end % self._capacity] = token
        self.end += 1
        for size in (LONG, SHORT):
            gram = tuple(self.tail(size))
            if len(gram) == size and SEPARATOR not in gram:
                self._ends.setdefault(gram, deque()).append(self.end)

    def _lose_oldest(self) -> None:
        for size in (LONG, SHORT):
            gram = tuple(self[position] for position in range(self.start, min(self.start + size, self.end)))
            if gram in self._ends:
                self._ends[gram].popleft()
                if not self._ends[gram]:
                    del self._ends[gram]


class Voter(NamedTuple):
    """A place that agrees with the draft so far: the next token there is what it votes for."""

    text: Text
    position: int
    weight: int


def propose(
    own: Sequence[Text], corpora: Sequence[Text | None], draws: Sequence[Draw | None], most: Sequence[int]
) -> list[Proposal]:
    """One draft per row of at most `most` tokens; see engine.speculation.corpora.propose."""
    rows = zip(own, corpora, draws, most, strict=True)
    return [_draft(text, corpus, draw, min(wanted, LONGEST)) for text, corpus, draw, wanted in rows]


def _draft(own: Text, corpus: Text | None, draw: Draw | None, most: int) -> Proposal:
    context = own.tail(REACH)
    found = [(text, *place) for text in (own, corpus) if text is not None for place in _places(text, context)]
    if not found or most < 1:
        return NOTHING
    voters = [Voter(text, position, length * length) for text, position, length in found]
    tokens: list[int] = []
    shares: list[float] = []
    while voters and len(tokens) < most:
        token, share = _elect(voters, _key(draw, len(tokens)))
        tokens.append(token)
        shares.append(share)
        voters = [moved for voter in voters if (moved := _follow(voter, token)) is not None]
    return Proposal(tokens, max(length for _, _, length in found), shares)


def _places(text: Text, context: list[int]) -> list[tuple[int, int]]:
    """(position, length of the match) of the places that vote: those behind the last 4 tokens, else the last 2."""
    for size in (LONG, SHORT):
        if len(context) >= size:
            places = list(islice(text.places(context[-size:]), WALK))
            if places:
                return [(place, text.match(place, context)) for place in places]
    return []


def _elect(voters: Sequence[Voter], key: int | None) -> tuple[int, float]:
    """The token with the most votes, each multiplied by the verifier's own noise where there is any; and its share.

    The first of equals wins: voters come newest first, the request's own before its namespace's.
    """
    votes: dict[int, float] = {}
    for text, position, weight in voters:
        votes[text[position]] = votes.get(text[position], 0.0) + weight
    if key is not None:
        votes = {token: weight / _exponential(key, token) for token, weight in votes.items()}
    winner = max(votes, key=lambda token: votes[token])
    return winner, votes[winner] / sum(votes.values())


def _follow(voter: Voter, token: int) -> Voter | None:
    """The voter behind `token`, if it voted for it and has more to say."""
    text, position, weight = voter
    if text[position] != token or position + 1 >= text.end or text[position + 1] == SEPARATOR:
        return None
    return Voter(text, position + 1, weight)


def _key(draw: Draw | None, offset: int) -> int | None:
    """The key of the noise that the token `offset` places on will be drawn with; None where it is the greedy one."""
    if draw is None or draw.sampling.temperature <= 0:
        return None
    return _row_key(draw._replace(position=draw.position + offset))


def _exponential(key: int, token: int) -> float:
    """What a token's odds are divided by when it is drawn: its Gumbel noise is minus the logarithm of this."""
    bits = _finalise(_finalise((key + token * GOLDEN) & MASK)) & 0xFFFFFFFF
    return -math.log((bits + 0.5) * 2.0**-32)


def _finalise(value: int) -> int:
    value = ((value ^ (value >> 30)) * MIX_1) & MASK
    value = ((value ^ (value >> 27)) * MIX_2) & MASK
    return value ^ (value >> 31)
