"""Word-by-word difference of two texts, for pages rendered on the server."""

import re
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

WORDS = re.compile(r"\w+|\s+|[^\w\s]")
LONGEST = 4000


class Piece(NamedTuple):
    """A stretch of text: in both, only in the old one, or only in the new one."""

    kind: Literal["same", "gone", "new"]
    text: str


def diff(old: str, new: str) -> list[Piece]:
    """The pieces in reading order. Texts of more than some thousand words come back whole, old then new."""
    before, after = WORDS.findall(old), WORDS.findall(new)
    if old == new:
        return [Piece("same", old)]
    if len(before) > LONGEST or len(after) > LONGEST:
        return [Piece("gone", old), Piece("new", new)]
    pieces: list[Piece] = []
    for tag, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", "".join(before[a:b])))
            continue
        pieces += [Piece("gone", "".join(before[a:b]))] if b > a else []
        pieces += [Piece("new", "".join(after[c:d]))] if d > c else []
    return pieces
