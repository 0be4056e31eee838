"""What each author's rows do to a revision: how many there are, and whether they agree with what two people held out.

The delta is of a word-pair model, which costs nothing: how many bits a word the held-out answers cost more when the
author's rows are left out. Below zero their rows pull away from what two people agreed on.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

from services.store.examples import Draft
from services.store.forms import is_supervised
from worker.curation.screens import author_of

AUTHORS_MOST = 50
ANSWERS_MOST = 500
WORDS_MOST = 400
PAIR_WEIGHT = 0.6

Pair = tuple[str, str]


class _Model:
    """Counts of words and of word pairs."""

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.pairs: Counter[Pair] = Counter()

    def add(self, answer: Sequence[str]) -> None:
        self.words.update(answer)
        self.pairs.update(pairwise(answer))


def tell(kept: Sequence[Draft]) -> list[dict[str, Any]]:
    """A line for each author, most rows first; `delta` in bits a word, None where there is nothing to compare."""
    rows = Counter(author for draft in kept if (author := author_of(draft)) is not None)
    train = sum(draft.split == "train" for draft in kept)
    listed = sorted(rows, key=lambda author: (-rows[author], author))[:AUTHORS_MOST]
    deltas = _deltas(kept, listed) if len(rows) > 1 else {}
    return [
        {
            "author": author, "rows": rows[author], "share": round(rows[author] / train, 4),
            "delta": deltas.get(author),
        }
        for author in listed
    ]  # fmt: skip


def _deltas(kept: Sequence[Draft], authors: Sequence[str]) -> dict[str, float]:
    whole, own = _Model(), {author: _Model() for author in authors}
    for draft in kept:
        if draft.split != "train" or not is_supervised(draft):
            continue
        answer = _words(draft)
        whole.add(answer)
        if (author := author_of(draft)) in own:
            own[author].add(answer)
    judged = [draft for draft in kept if draft.split == "held_out" and is_supervised(draft)]
    answers = [_words(draft) for draft in sorted(judged, key=lambda draft: draft.content_hash)[:ANSWERS_MOST]]
    if not any(answers):
        return {}
    base = _bits(answers, whole, _Model())
    return {author: round(_bits(answers, whole, own[author]) - base, 4) for author in authors}


def _words(draft: Draft) -> list[str]:
    return (draft.completion or "").lower().split()[:WORDS_MOST]


def _bits(answers: Sequence[Sequence[str]], whole: _Model, without: _Model) -> float:
    """Mean bits a word of the answers under the counts of `whole` less those of `without`."""
    total = sum(whole.words.values()) - sum(without.words.values())
    vocabulary = len(whole.words.keys() | set(chain.from_iterable(answers))) + 1
    bits, count = 0.0, 0
    for answer in answers:
        for before, word in zip(["", *answer], answer, strict=False):
            single = (whole.words[word] - without.words[word] + 1) / (total + vocabulary)
            seen = whole.words[before] - without.words[before]
            pair = whole.pairs[before, word] - without.pairs[before, word]
            bits -= math.log2(PAIR_WEIGHT * pair / seen + (1 - PAIR_WEIGHT) * single if seen else single)
            count += 1
    return bits / count
