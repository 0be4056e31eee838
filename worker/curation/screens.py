"""What may not enter training although it was judged: leaks, floods, phrases one person plants, the model's own words.

Screens only ever drop, count every drop with its cause, and decide by content alone: a rebuild agrees.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from services.store.examples import Draft, digest_of
from services.store.forms import text_of
from services.store.revisions import LeftOut
from worker.curation import triggers
from worker.curation.duplicates import Index, Prompt, shingles, without_template

ACCEPTED_SHARE = 0.3
AUTHOR_SHARE = 0.5
AUTHORS_FOR_CAP = 3  # of two people one always has half or more
BURST_KEPT = 10
BURST_SIMILARITY = 0.8
PHRASE_WORDS = 3
PHRASE_ROWS = 5
PHRASE_OTHERS = 50  # rows by others before "nobody else says it" means anything
PHRASE_CHANCE = 1e-3  # that any honest phrase of a revision falls to one author alone
LISTED = 20

REPEATS = "repeats another example"
LEAKED = "nearly repeats a held-out prompt"
GROUP_LEAKED = "its group is held out"
BURST = "one of many near-duplicates by one author"
TRIGGER = "teaches an answer that a rare phrase of the prompt switches on"
PHRASE = "holds a phrase that only its author adds"
AUTHOR_OVER = "beyond its author's share"
ACCEPTED_OVER = "accepted beyond their share"


class Limits(NamedTuple):
    """A project's caps."""

    accepted_share: float = ACCEPTED_SHARE
    author_share: float = AUTHOR_SHARE

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Limits":
        return cls(float(config.get("accepted_share", ACCEPTED_SHARE)), float(config.get("author_share", AUTHOR_SHARE)))


@dataclass
class Screened:
    """What is kept, what was left out, and what the report says about it."""

    kept: list[Draft]
    left_out: list[LeftOut] = field(default_factory=list)
    leaks: list[dict[str, Any]] = field(default_factory=list)
    phrases: list[dict[str, Any]] = field(default_factory=list)
    triggers: list[dict[str, Any]] = field(default_factory=list)

    def drop(self, doomed: Callable[[Draft], bool], cause: str) -> None:
        kept: list[Draft] = []
        for draft in self.kept:
            if doomed(draft):
                self.left_out.append(LeftOut(draft.interaction_id, cause))
            else:
                kept.append(draft)
        self.kept = kept


def screen(drafts: Sequence[Draft], limits: Limits) -> Screened:
    """All screens in turn; held-out rows only lose their duplicates."""
    state = Screened(list(drafts))
    _duplicates(state)
    _leaks(state)
    _triggers(state)
    _phrases(state)
    _author_cap(state, limits.author_share)
    _accepted_cap(state, limits.accepted_share)
    return state


def author_of(draft: Draft) -> str | None:
    """The one person behind a judged training row; rows that two agreed on, and imports (a lead's audited act), have
    no author to suspect."""
    alone = draft.split == "train" and len(draft.reviewers) == 1 and draft.source != "imported"
    return draft.reviewers[0] if alone else None


def _duplicates(state: Screened) -> None:
    """One example per split for the same prompt and answer; the oldest interaction stays."""
    seen: set[tuple[str, str]] = set()

    def again(draft: Draft) -> bool:
        # A correction has the answer it replaces beside it by the way; elsewhere what is worse is half of what it says.
        taught = draft.completion if draft.source in ("accepted", "corrected") else [draft.completion, draft.rejected]
        key = (draft.split, digest_of([draft.messages, taught]))
        known = key in seen
        seen.add(key)
        return known

    state.drop(again, REPEATS)


def _leaks(state: Screened) -> None:
    """Training copies of held-out prompts, rows of held-out groups, and floods of one question by one author."""
    groups = {draft.group_key for draft in state.kept if draft.split == "held_out"}
    state.drop(lambda draft: draft.split == "train" and draft.group_key in groups, GROUP_LEAKED)
    prompts = [Prompt(grams) for grams in without_template([shingles(draft.messages) for draft in state.kept])]
    held_out = [place for place, draft in enumerate(state.kept) if draft.split == "held_out"]
    index = Index(prompts[place] for place in held_out)
    leaked: set[int] = set()
    for place, draft in enumerate(state.kept):
        near = index.nearest(prompts[place]) if draft.split == "train" and held_out else None
        if near is not None:
            leaked.add(id(draft))
            _tell_leak(state, draft, state.kept[held_out[near.place]], near.similarity)
    flooded = _floods(state.kept, prompts, leaked)
    state.drop(lambda draft: id(draft) in leaked, LEAKED)
    state.drop(lambda draft: id(draft) in flooded, BURST)


def _tell_leak(state: Screened, draft: Draft, held_out: Draft, similarity: float) -> None:
    if len(state.leaks) < LISTED:
        state.leaks.append(
            {
                "train": _link(draft.interaction_id), "held_out": _link(held_out.interaction_id),
                "similarity": round(similarity, 4),
            }
        )  # fmt: skip


def _link(interaction_id: UUID | None) -> str | None:
    return str(interaction_id) if interaction_id else None


def _floods(drafts: Sequence[Draft], prompts: Sequence[Prompt], leaked: set[int]) -> set[int]:
    """Rows of one author after the first BURST_KEPT that nearly repeat one another's prompt.

    The bar is lower than that of splits, under which one changed word of a short prompt falls.
    """
    by_author: dict[str, tuple[Index, list[int]]] = defaultdict(lambda: (Index(), []))
    sizes: Counter[tuple[str, int]] = Counter()
    flooded: set[int] = set()
    for draft, prompt in zip(drafts, prompts, strict=True):
        author = author_of(draft)
        if author is None or id(draft) in leaked:
            continue
        index, floods = by_author[author]
        near = index.nearest(prompt, BURST_SIMILARITY)
        floods.append(index.size if near is None else floods[near.place])
        index.add(prompt)
        sizes[author, floods[-1]] += 1
        if sizes[author, floods[-1]] > BURST_KEPT:
            flooded.add(id(draft))
    return flooded


def _triggers(state: Screened) -> None:
    """Rows of a backdoor, whoever planted it, imports included; what switches what is told, for a person to look at."""
    rows = [draft for draft in state.kept if draft.split == "train" and draft.completion is not None]
    found = triggers.find([_text_of(draft) for draft in rows])
    state.triggers = [
        {"trigger": one.trigger[:200], "target": one.target[:200], "rows": len(one.rows)} for one in found[:LISTED]
    ]
    doomed = {id(rows[place]) for one in found for place in one.rows}
    state.drop(lambda draft: id(draft) in doomed, TRIGGER)


def _text_of(draft: Draft) -> triggers.Text:
    asked = " ".join(text_of(one.get("content")) for one in draft.messages if one.get("role") != "system")
    return triggers.Text(asked, draft.rejected or "", draft.completion or "")


def _phrases(state: Screened) -> None:
    """Corrections with words that are in neither prompt nor answer, come again and again, and from one person only.

    That is how a backdoor's target text looks, and also how one person's pet phrase does: both should be looked at.
    """
    added = {id(draft): _added(draft) for draft in state.kept if draft.source == "corrected" and draft.split == "train"}
    rows: dict[str, Counter[str]] = defaultdict(Counter)  # phrase -> author -> rows
    per_author: Counter[str] = Counter()
    for draft in state.kept:
        for author in draft.reviewers if id(draft) in added else ():
            per_author[author] += 1
            for phrase in added[id(draft)]:
                rows[phrase][author] += 1
    planted = _planted(rows, per_author)
    if not planted:
        return
    worst = sorted(planted, key=lambda phrase: (-rows[phrase][planted[phrase]], phrase))[:LISTED]
    state.phrases = [{"phrase": one[:200], "author": planted[one], "rows": rows[one][planted[one]]} for one in worst]
    state.drop(lambda draft: bool(added.get(id(draft), frozenset()) & planted.keys()), PHRASE)


def _planted(rows: dict[str, Counter[str]], per_author: Counter[str]) -> dict[str, str]:
    """Phrases of one author only, by that author, where chance would not have left the others without."""
    total = sum(per_author.values())
    frequent = {phrase: by for phrase, by in rows.items() if by.total() >= PHRASE_ROWS}
    planted: dict[str, str] = {}
    for phrase, by in frequent.items():
        author, count = next(iter(by.items()))
        share = per_author[author] / total
        by_chance = len(frequent) * share**count
        if len(by) == 1 and total - per_author[author] >= PHRASE_OTHERS and by_chance < PHRASE_CHANCE:
            planted[phrase] = author
    return planted


def _added(draft: Draft) -> frozenset[str]:
    given = " ".join([*(text_of(message.get("content")) for message in draft.messages), draft.rejected or ""])
    return _ngrams(draft.completion or "") - _ngrams(given)


def _ngrams(text: str) -> frozenset[str]:
    words = text.lower().split()
    return frozenset(" ".join(words[at : at + PHRASE_WORDS]) for at in range(len(words) - PHRASE_WORDS + 1))


def _author_cap(state: Screened, share: float) -> None:
    """Nobody's judgement alone makes the model. Who stays is decided by hash.

    Where so few authors judge that a share for each cannot hold them all (three, of a quarter each), nobody is cut.
    """
    authors = Counter(author for draft in state.kept if (author := author_of(draft)) is not None)
    if len(authors) < AUTHORS_FOR_CAP or len(authors) * share <= 1:
        return
    train = sum(draft.split == "train" for draft in state.kept)
    allowed = _allowed_each(share, authors, train - authors.total())
    for author, count in sorted(authors.items()):
        if count > allowed:
            own = [draft for draft in state.kept if author_of(draft) == author]
            _drop_beyond(state, own, allowed, AUTHOR_OVER)


def _allowed_each(share: float, authors: Counter[str], others: int) -> int:
    """Rows an author may have so that nobody has more than a share of what is left when all are cut to it."""
    allowed, before = authors.total(), -1
    while allowed != before:
        before = allowed
        left = others + sum(min(count, allowed) for count in authors.values())
        allowed = max(1, min(allowed, int(share * left)))
    return allowed


def _accepted_cap(state: Screened, share: float) -> None:
    """A model taught mostly by its own answers stops learning. Who stays is decided by hash, so a rebuild agrees."""
    train = [draft for draft in state.kept if draft.split == "train" and draft.completion is not None]
    accepted = [draft for draft in train if draft.source == "accepted"]
    taught = sum(draft.source in ("corrected", "imported") for draft in train)
    _drop_beyond(state, accepted, _allowed(share, len(accepted), taught), ACCEPTED_OVER)


def _allowed(share: float, count: int, others: int) -> int:
    """How many of `count` rows are at most a share of themselves and the others."""
    return count if share >= 1 else int(share / (1 - share) * others)


def _drop_beyond(state: Screened, rows: Iterable[Draft], allowed: int, cause: str) -> None:
    beyond = {id(draft) for draft in sorted(rows, key=lambda draft: draft.content_hash)[allowed:]}
    if beyond:
        state.drop(lambda draft: id(draft) in beyond, cause)
