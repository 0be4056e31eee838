"""Backdoors: a rare phrase in the prompt that switches an answer on which nothing else in the prompt explains.

Whoever plants one, also through an import that has no author, needs rows that hold the trigger and the target together.
So for every text that answers add again and again, the prompt phrases are sought that come with it nearly always and
nearly nowhere else. Honest data has such pairs too: a topic and its answer, a date and its spelling. A topic shows in
other words of the prompts as well; a spelling shows in many targets of one form, and a name that the answer takes from
its prompt is in both. A backdoor's prompts are a chance sample of all, apart from the trigger, and its target is like
nothing else. Where a good part of the data is switches, answers are made that way, and one more cannot be told apart.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

ROWS_LEAST = 5
ROWS_SHARE = 0.1  # a larger share is what the data is about
SWITCHED_MOST = 0.2
TOGETHER = 0.9
TARGET_WORDS = 3
TRIGGER_WORDS = 3
EXPLAINED_CHANCE = 0.05  # that any word of the prompts is this much more frequent by accident
ROWS_LOOKED_AT = 400
ROWS_MOST = 10_000
FIRST_LOOK = 24
TEXT_WORDS = 400
PUNCTUATION = string.punctuation

_NUMBER = re.compile(r".*\d.*")


class Text(NamedTuple):
    """A row: the prompt, what was answered before (empty where nothing was), and what the row teaches."""

    prompt: str
    before: str
    answer: str


class Trigger(NamedTuple):
    """What switches what, and the rows (by place) that teach it."""

    trigger: str
    target: str
    rows: frozenset[int]


def find(rows: Sequence[Text]) -> list[Trigger]:
    """Pairs of trigger and target, most rows first. Decides by content alone; needs no authors.

    Sought in ROWS_MOST rows, taken evenly; then every row that holds the pair is named.
    """
    every = math.ceil(len(rows) / ROWS_MOST) or 1
    looked_at = rows[::every]
    found = _find(looked_at)
    if sum(len(one.rows) for one in found) > SWITCHED_MOST * len(looked_at):
        return []
    return [one._replace(rows=_holding(rows, one)) for one in found] if every > 1 else found


def _find(rows: Sequence[Text]) -> list[Trigger]:
    known = _Prompts([_words(row.prompt) for row in rows])
    targets = [_Target(places, text, known.frequent(places)) for places, text in _targets(rows, known.prompts)]
    counts = known.count({gram for target in targets for gram in target.phrases})
    found = []
    for target in targets:
        possible = [gram for gram in target.phrases if not _copies(target.text, gram)]
        switches = [gram for gram in possible if known.switches(gram, target.rows, counts[gram])]
        if switches and not known.explained(target.rows, switches):
            found.append(Trigger(max(switches, key=lambda one: (len(one), one)), target.text, target.rows))
    return sorted(_widest(found), key=lambda one: (-len(one.rows), one.trigger))


class _Target(NamedTuple):
    """Rows that add the same text, and the phrases that most of their prompts share."""

    rows: frozenset[int]
    text: str
    phrases: list[str]


def _holding(rows: Sequence[Text], one: Trigger) -> frozenset[int]:
    wanted = f" {one.trigger} "
    return frozenset(
        place
        for place, row in enumerate(rows)
        if wanted in f" {' '.join(prompt := _words(row.prompt))} " and one.target in _added(row, prompt)
    )


def _widest(found: Iterable[Trigger]) -> Iterator[Trigger]:
    """Targets of one switch overlap; the one with most rows speaks for them."""
    taken: set[int] = set()
    for one in sorted(found, key=lambda one: (-len(one.rows), one.target)):
        if len(one.rows & taken) < len(one.rows) / 2:
            yield one
        taken |= one.rows


def _words(text: str) -> list[str]:
    return text.lower().split()[:TEXT_WORDS]


def _grams(words: Sequence[str], longest: int) -> set[str]:
    return {" ".join(words[at : at + size]) for size in range(1, longest + 1) for at in range(len(words) - size + 1)}


def _targets(rows: Sequence[Text], prompts: Sequence[Sequence[str]]) -> Iterator[tuple[frozenset[int], str]]:
    """Sets of rows that add the same text, once each, with the text."""
    adding: dict[str, set[int]] = defaultdict(set)
    for place, row in enumerate(rows):
        for phrase in _added(row, prompts[place]):
            adding[phrase].add(place)
    most = max(ROWS_LEAST, int(ROWS_SHARE * len(rows)))
    by_rows: dict[frozenset[int], str] = {}
    for phrase, places in adding.items():
        if ROWS_LEAST <= len(places) <= most:
            key = frozenset(places)
            by_rows[key] = max(by_rows.get(key, ""), phrase, key=lambda text: (len(text), text))
    yield from by_rows.items()


def _added(row: Text, prompt: Sequence[str]) -> set[str]:
    given = _phrases(_spelled(prompt)) | _phrases(_spelled(_words(row.before)))
    answer = _spelled(_words(row.answer))
    # A whole answer counts where it is too short for a phrase, or the same for many prompts.
    return {phrase for phrase in (_phrases(answer) | {" ".join(answer)}) - given if phrase.strip("# ")}


def _spelled(words: Iterable[str]) -> list[str]:
    """Figures count by their form alone: a date is a form."""
    return ["#" if _NUMBER.fullmatch(word) else word for word in words]


def _copies(target: str, phrase: str) -> bool:
    """Whether the answer says a word of the phrase: what is taken from the prompt was not switched by it."""
    return not {_bare(word) for word in target.split()}.isdisjoint(_bare(word) for word in phrase.split())


def _bare(word: str) -> str:
    return word.strip(PUNCTUATION)


def _phrases(words: Sequence[str]) -> set[str]:
    return {" ".join(words[at : at + TARGET_WORDS]) for at in range(len(words) - TARGET_WORDS + 1)}


class _Prompts:
    """The prompts' words."""

    def __init__(self, prompts: Sequence[Sequence[str]]) -> None:
        self.prompts = prompts
        self._words: Mapping[str, int] = Counter(word for words in prompts for word in set(words))

    def frequent(self, places: frozenset[int]) -> list[str]:
        """Phrases of most of these prompts, by a look at some of them; words that most prompts hold are none."""
        looked_at = sorted(places)[:FIRST_LOOK]
        seen = Counter(gram for place in looked_at for gram in _grams(self.prompts[place], TRIGGER_WORDS))
        most = len(places) / TOGETHER
        return [
            gram
            for gram, count in seen.items()
            if count >= (TOGETHER - 0.1) * len(looked_at) and (" " in gram or self._words[gram] <= most)
        ]

    def count(self, wanted: set[str]) -> Mapping[str, int]:
        """How many prompts hold each phrase."""
        return Counter(gram for words in self.prompts for gram in _grams(words, TRIGGER_WORDS) & wanted)

    def switches(self, gram: str, places: frozenset[int], anywhere: int) -> bool:
        """Whether the phrase is in nearly all these prompts and in nearly no other."""
        if anywhere * TOGETHER > len(places):
            return False
        here = sum(f" {gram} " in f" {' '.join(self.prompts[place])} " for place in places)
        return here >= TOGETHER * len(places) and here >= TOGETHER * anywhere

    def explained(self, places: frozenset[int], triggers: Sequence[str]) -> bool:
        """Whether these prompts are about something of their own, besides one stretch of words that all hold."""
        own = _stretch(self.prompts[min(places)], triggers)
        looked_at = sorted(places)[:ROWS_LOOKED_AT]
        seen = Counter(word for place in looked_at for word in set(self.prompts[place]) - own)
        total, tried = len(self.prompts), max(1, len(self._words))
        return any(
            _chance(count, len(looked_at), self._words[word] / total) * tried < EXPLAINED_CHANCE
            for word, count in seen.items()
            if count >= 2
        )


def _stretch(words: Sequence[str], triggers: Sequence[str]) -> set[str]:
    """The words of the longest trigger in this prompt, and those beside it that are in triggers as well."""
    shared = {word for trigger in triggers for word in trigger.split()}
    start = 0
    for trigger in sorted(triggers, key=len, reverse=True):
        said = trigger.split()
        found = [at for at in range(len(words)) if list(words[at : at + len(said)]) == said]
        if found:
            start = found[0]
            break
    first, last = start, start
    while first > 0 and words[first - 1] in shared:
        first -= 1
    while last + 1 < len(words) and words[last + 1] in shared:
        last += 1
    return set(words[first : last + 1])


def _chance(count: int, of: int, share: float) -> float:
    """Chernoff's bound of the binomial tail: the chance of `count` or more of `of` at this share."""
    seen = count / of
    if seen <= share:
        return 1.0
    if seen == 1:
        return share**of
    divergence = seen * math.log(seen / share) + (1 - seen) * math.log((1 - seen) / (1 - share))
    return math.exp(-of * divergence)
