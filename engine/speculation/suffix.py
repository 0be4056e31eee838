"""Turbo-0 in plain Python: drafts what followed the last tokens before, in this request and in its namespace's answers.

The reference that engine/native/suffix.h is tested against, and what drafts where that cannot be built. No training:
where the last 4 tokens (else the last 2) stood before, those places vote on what comes next, token after token.
"""

import math
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from engine.layers.sampler import GOLDEN, MASK, MIX_1, MIX_2, Draw, _row_key

# Stands between two answers; no draft crosses it.
SEPARATOR = -1
# What the index finds: places behind the same 4 tokens, else the same 2, else the same one.
GRAMS = (4, 2, 1)
# The most places of a text that vote (newest first), the most tokens of a match that are counted, the longest draft.
WALK, REACH, LONGEST = 16, 32, 64
# What follows was found on the starter model's three applications; benchmarks/NOTES.md says what each is worth.
# The part of the votes that the request's own places have beside a corpus: (matches shorter than, part); and what they
# have when they agree in more than a token and the corpus does not.
TRUST = ((2, 0.3), (4, 0.4), (8, 0.5), (REACH + LONGEST + 1, 0.6))
TRUST_AGAINST_ONE = 0.6
# Votes that nobody gets, as if so many of a corpus' places had named a token never seen there; and as many where the
# corpus knows nothing like it: copying went on too long.
ESCAPE = 0.5
# A token of the prompt is the likelier to be meant: its votes in the corpus count so many times.
PRESENT = 4
# So is what an own place names when the corpus has seen it behind the last three tokens, wherever it was.
CONFIRMED = 4


class Rivals(NamedTuple):
    """The first token of the draft without the verifier's noise, and with it; what comes says which is better here."""

    plain: int
    drawn: int


class Proposal(NamedTuple):
    """A draft. `match` is how many tokens before it were found again (0: nothing was, and there is no draft).

    `shares[i]` is the part of the votes that `tokens[i]` had among the places that agree with the draft before it.
    `rivals`, of rows with a temperature, where the two differ.
    """

    tokens: list[int]
    match: int
    shares: list[float]
    rivals: Rivals | None = None


NOTHING = Proposal([], 0, [])


class Ask(NamedTuple):
    """One row: its own text, its corpus, the draw of the first drafted token, tokens wanted, whether noise votes.

    Both texts are of the module whose `propose` is asked.
    """

    own: Any
    corpus: Any
    draw: Draw | None
    most: int
    drawn: bool


class Text:
    """The newest `capacity` tokens of a text, and at which positions each of their n-grams ends.

    A position counts all tokens ever added; position p is the place before token p. `own` matters to the twin in C++,
    which takes in a request's own tokens late.
    """

    def __init__(self, capacity: int, *, own: bool) -> None:  # noqa: ARG002 - one signature for both
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
        """About what it occupies: the tokens, and an entry in a dictionary for each n-gram."""
        return len(self._ring) * 8 + len(self._ends) * 1000

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end; the oldest go where there is no room."""
        for token in tokens:
            self._append(token)

    def close(self) -> None:
        """Drop everything."""
        self._ring, self._ends, self.end = [], {}, 0

    def tail(self, count: int) -> list[int]:
        """The last `count` tokens, or all there are."""
        return [self[position] for position in range(max(self.start, self.end - count), self.end)]

    def knows(self, gram: Sequence[int]) -> bool:
        """Whether an n-gram of an indexed length is here."""
        return tuple(gram) in self._ends

    def search(self, context: Sequence[int]) -> "list[Voter]":
        """The newest places behind the longest of the indexed n-grams at the end of `context` that has any."""
        for size in GRAMS:
            ends = self._ends.get(tuple(context[-size:]), ()) if len(context) >= size else ()
            # One more than may vote: the newest is where the request's own text ends.
            newest = [end for end in islice(reversed(ends), WALK + 1) if end < self.end and self[end] != SEPARATOR]
            if newest:
                return [Voter(self, end, self._match(end, context[-REACH:])) for end in newest[:WALK]]
        return []

    def _match(self, position: int, context: Sequence[int]) -> int:
        """How many tokens before `position` are those at the end of `context`."""
        length = 0
        most = min(len(context), position - self.start)
        while length < most and self[position - length - 1] == context[-length - 1]:
            length += 1
        return length

    def _append(self, token: int) -> None:
        if len(self._ring) < self._capacity:
            self._ring.append(token)
        else:
            self._lose_oldest()
            self._ring[self.end % self._capacity] = token
        self.end += 1
        for size in GRAMS:
            gram = tuple(self.tail(size))
            if len(gram) == size and SEPARATOR not in gram:
                self._ends.setdefault(gram, deque()).append(self.end)

    def _lose_oldest(self) -> None:
        for size in GRAMS:
            gram = tuple(self[position] for position in range(self.start, min(self.start + size, self.end)))
            if gram in self._ends:
                self._ends[gram].popleft()
                if not self._ends[gram]:
                    del self._ends[gram]


class Voter(NamedTuple):
    """A place that agrees with the last `length` tokens: the token there is what it votes for."""

    text: Text
    position: int
    length: int

    @property
    def token(self) -> int:
        return self.text[self.position]

    @property
    def moved(self) -> "Voter":
        return Voter(self.text, self.position + 1, self.length + 1)

    @property
    def silent(self) -> bool:
        """Whether nothing follows here."""
        return self.position >= self.text.end or self.token == SEPARATOR


def propose(asks: Sequence[Ask]) -> list[Proposal]:
    """One draft per row; see engine.speculation.corpora.propose."""
    return [_draft(ask) for ask in asks]


def _draft(ask: Ask) -> Proposal:
    own: Text = ask.own
    corpus: Text | None = ask.corpus
    context = own.tail(REACH)
    mine: list[Voter] = []
    theirs: list[Voter] = []
    draft = NOTHING
    while len(draft.tokens) < min(ask.most, LONGEST):
        mine = mine or own.search(context)
        theirs = theirs or (corpus.search(context) if corpus is not None else [])
        if not mine and not theirs:
            break
        votes, rest = _vote(own, mine, corpus, theirs, context)
        key = _key(ask.draw, len(draft.tokens))
        chosen = _elect(votes, rest, key if ask.drawn else None)
        if not draft.tokens:
            draft = Proposal([], _longest(mine + theirs), [], _rivals(votes, key))
        draft.tokens.append(chosen.token)
        draft.shares.append(chosen.share)
        context.append(chosen.token)
        mine = _follow(mine, chosen.token)
        agreed = any(voter.token == chosen.token for voter in theirs)
        theirs = _follow(theirs, chosen.token)
        if agreed and not theirs:
            # Past the end of every answer that agrees there is nothing to draft.
            break
    return draft


def _vote(
    own: Text, mine: Sequence[Voter], corpus: Text | None, theirs: Sequence[Voter], context: Sequence[int]
) -> tuple[dict[int, float], float]:
    """Votes per token, in the order in which they were first named, and the votes nobody has."""
    trust = 1.0 if not theirs else 0.0 if not mine else _trust(_longest(mine), _longest(theirs))
    votes: dict[int, float] = {}
    weights = _tally(mine)
    total = sum(weights.values())
    for token, weight in weights.items():
        votes[token] = trust * weight / total
        if corpus is not None and theirs and len(context) >= 3 and corpus.knows([*context[-3:], token]):
            votes[token] += CONFIRMED * weight / total
    if not theirs:
        return votes, 0.0 if corpus is None else ESCAPE
    faith = (1 - trust) * len(theirs) / (len(theirs) + ESCAPE)
    weights = _tally(theirs)
    total = sum(weights.values())
    for token, weight in weights.items():
        votes[token] = votes.get(token, 0.0) + faith * weight * (PRESENT if own.knows([token]) else 1) / total
    return votes, (1 - trust) * ESCAPE / (len(theirs) + ESCAPE)


def _trust(own: int, corpus: int) -> float:
    if corpus < 2 <= own:
        return TRUST_AGAINST_ONE
    return next(part for end, part in TRUST if own < end)


def _tally(voters: Sequence[Voter]) -> dict[int, int]:
    """Per token the squares of the lengths of the matches behind which it stood."""
    weights: dict[int, int] = {}
    for voter in voters:
        weights[voter.token] = weights.get(voter.token, 0) + voter.length**2
    return weights


def _longest(voters: Sequence[Voter]) -> int:
    return max(voter.length for voter in voters)


def _follow(voters: Sequence[Voter], token: int) -> list[Voter]:
    """Behind `token` those that voted for it and have more to say."""
    return [voter.moved for voter in voters if voter.token == token and not voter.moved.silent]


class Chosen(NamedTuple):
    token: int
    share: float


def _elect(votes: dict[int, float], rest: float, key: int | None) -> Chosen:
    """The token with the most votes, multiplied by the verifier's own noise where there is a key; and its share.

    The first of equals wins: voters come newest first, the request's own before its namespace's.
    """
    if key is not None:
        votes = {token: weight / _exponential(key, token) for token, weight in votes.items()}
    winner = max(votes, key=lambda token: votes[token])
    total = 0.0
    for weight in votes.values():
        total += weight
    return Chosen(winner, votes[winner] / (total + rest))


def _rivals(votes: dict[int, float], key: int | None) -> Rivals | None:
    if key is None:
        return None
    rivals = Rivals(_elect(votes, 0.0, None).token, _elect(votes, 0.0, key).token)
    return None if rivals.plain == rivals.drawn else rivals


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
