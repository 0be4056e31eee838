"""Word-by-word difference of two texts, for pages rendered on the server.

A page shows dozens of them, so each has a bound on its work: what differs beyond it is shown whole, old then new.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, NamedTuple

# A word or a sign with the blanks before it; only words are compared.
WORDS = re.compile(r"(\s*)(\w+|[^\w\s])")
# Letters of a text that is taken apart at all, and words of the one times words of the other between a common
# beginning and a common end: milliseconds each.
LETTERS_MOST = 16_000
PAIRS_MOST = 2_250_000

Kind = Literal["same", "gone", "new"]


class Piece(NamedTuple):
    """A stretch of text: in both, only in the old one, or only in the new one."""

    kind: Kind
    text: str


class Text(NamedTuple):
    """The words of a text and the blanks before each. The last word is empty and bears the blanks at the end."""

    words: list[str]
    blanks: list[str]

    def between(self, start: int, end: int) -> str:
        """These words as they were written, the blanks before the first one included."""
        return "".join(chain.from_iterable(zip(self.blanks[start:end], self.words[start:end], strict=True)))


class Match(NamedTuple):
    """Places of the same word in the old and the new text."""

    old: int
    new: int


def diff(old: str, new: str) -> list[Piece]:
    """The pieces in reading order; those not "new" are the old text, those not "gone" the new one."""
    if old == new:
        return [Piece("same", old)]
    if max(len(old), len(new)) > LETTERS_MOST:
        return _joined([("gone", old), ("new", new)])
    before, after = _taken_apart(old), _taken_apart(new)
    return _joined(_woven(before, after, _matches(before.words, after.words)))


def _taken_apart(text: str) -> Text:
    said = text.rstrip()  # blanks that no word ends would be tried from each of them
    found = WORDS.findall(said)
    return Text([word for _, word in found] + [""], [blank for blank, _ in found] + [text[len(said) :]])


# --- what is the same -------------------------------------------------------------------------------------


def _matches(before: list[str], after: list[str]) -> Iterable[Match]:
    """What both texts have, in order: beginning and end, and between them the most words that can stay."""
    most = min(len(before), len(after))
    head = next((place for place in range(most) if before[place] != after[place]), most)
    tail = next((back for back in range(most - head) if before[-1 - back] != after[-1 - back]), most - head)
    old, new = before[head : len(before) - tail], after[head : len(after) - tail]
    middle = _telling(longest_common(old, new), len(old), len(new)) if len(old) * len(new) <= PAIRS_MOST else []
    yield from (Match(place, place) for place in range(head))
    yield from (Match(head + one.old, head + one.new) for one in middle)
    yield from (Match(len(before) - back, len(after) - back) for back in range(tail, 0, -1))


def longest_common(old: Sequence[str], new: Sequence[str]) -> list[Match]:
    """A longest common subsequence: the classic table, a row a word of `new`, in it a bit a word of `old`.

    Hyyrö, "Bit-parallel LCS-length computation revisited", 2004. However alike or unlike the texts are, it takes
    len(old) × len(new) bits of work.
    """
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(old):
        places[word] |= 1 << place
    every = (1 << len(old)) - 1
    row, rows = every, []
    for word in new:  # a bit is 0 where the table grows by one from the column before
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & every
        rows.append(row)
    return _walked_back(rows, len(old))


def _walked_back(rows: Sequence[int], column: int) -> list[Match]:
    """The way through the table, from its end to its start."""
    matches: list[Match] = []
    row = len(rows)
    while row and column:
        if rows[row - 1] >> (column - 1) & 1:
            column -= 1
            continue
        row -= 1
        if not row or rows[row - 1] >> (column - 1) & 1:
            column -= 1
            matches.append(Match(column, row))
    return matches[::-1]


def _telling(matches: Sequence[Match], old: int, new: int) -> list[Match]:
    """Without stretches shorter than the changes on both sides of them: a comma that two sentences share by chance
    says nothing, and cuts them into shreds. `old` and `new` are the words on each side in all."""
    stretches: list[list[Match]] = []
    for match in matches:
        if stretches and stretches[-1][-1] == (match.old - 1, match.new - 1):
            stretches[-1].append(match)
        else:
            stretches.append([match])
    kept: list[Match] = []
    thens = [*(one[0] for one in stretches), Match(old, new)][1:]
    for stretch, then in zip(stretches, thens, strict=True):
        last = kept[-1] if kept else Match(-1, -1)
        if len(stretch) >= min(_gap(last, stretch[0]), _gap(stretch[-1], then)):
            kept += stretch
    return kept


def _gap(one: Match, other: Match) -> int:
    return max(other.old - one.old, other.new - one.new) - 1


# --- both texts again -------------------------------------------------------------------------------------


def _woven(before: Text, after: Text, matches: Iterable[Match]) -> Iterable[tuple[Kind, str]]:
    """Every word and blank of both. The empty words at their ends always match, so nothing is left over."""
    old = new = 0
    for match in matches:
        blank, other = before.blanks[match.old], after.blanks[match.new]
        if (old, new) != match or blank != other:
            yield from _changed(before, after, Match(old, new), match)
        else:
            yield "same", blank
        yield "same", before.words[match.old]
        old, new = match.old + 1, match.new + 1


def _changed(before: Text, after: Text, start: Match, end: Match) -> Iterable[tuple[Kind, str]]:
    """What lies between two words that are the same, and the blanks before the second of them."""
    gone, added = before.between(start.old, end.old), after.between(start.new, end.new)
    first, other = before.blanks[start.old], after.blanks[start.new]
    shared = first if gone and added and first == other else ""
    blank, other = before.blanks[end.old], after.blanks[end.new]
    differ = blank != other
    yield "same", shared
    yield "gone", gone[len(shared) :] + (blank if differ else "")
    yield "new", added[len(shared) :] + (other if differ else "")
    yield "same", "" if differ else blank


def _joined(parts: Iterable[tuple[Kind, str]]) -> list[Piece]:
    """Neighbours of a kind as one piece."""
    pieces: list[tuple[Kind, list[str]]] = []
    for kind, text in parts:
        if not text:
            continue
        if pieces and pieces[-1][0] == kind:
            pieces[-1][1].append(text)
        else:
            pieces.append((kind, [text]))
    return [Piece(kind, "".join(texts)) for kind, texts in pieces]
