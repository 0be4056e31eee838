"""What a project's drafters are worth: how far their drafts came, and which of them the policy chose.

Reads the `speculation` documents of the newest answers in each span of a window; see `services.store.speed`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Select, func, select, true
from sqlalchemy.orm import Session

from services.store.models import Interaction
from services.store.speed import SPANS, Window, answers_in, spans_of

# Documents that are read of a span, and rows that are counted towards the first heads.
MOST_ROWS, COUNTED_ROWS, FEW_ROWS = 100, 50_000, 2000


class Drafter(NamedTuple):
    """One drafter's drafts in the window; `digest` names heads. `reached[i]`: share whose token i came out."""

    name: str
    digest: str | None
    drafts: int
    drafted: int
    accepted: int
    reached: list[float]

    @property
    def per_draft(self) -> float:
        """Tokens of a draft that came out, on average."""
        return self.accepted / self.drafts


class Choice(NamedTuple):
    """What the policy chose in a span: shares of the steps, and how long a draft was on average."""

    at: datetime
    steps: int
    suffix: float
    heads: float
    none: float
    length: float | None


class Drafting(NamedTuple):
    """Drafters and choices of a window; `per_step` is tokens a step yielded where drafting was allowed."""

    answers: int
    per_step: float | None
    drafters: list[Drafter]
    choices: list[Choice]


def drafting(session: Session, project_id: UUID, seen: Window) -> Drafting:
    """What was drafted in a window and what came of it."""
    tallies: dict[tuple[str, str | None], Tally] = {}
    choices = [Chosen() for _ in range(SPANS)]
    answers = tokens = 0
    for row in session.execute(_documents(project_id, seen)):
        answers += 1
        tokens += row.completion_tokens
        told = row.speculation or {}
        choices[row.place].steps += told.get("steps", row.completion_tokens)
        for name in ("suffix", "heads"):
            if counts := told.get(name):
                digest = row.speculator_digest if name == "heads" else None
                tallies.setdefault((name, digest), Tally()).add(counts)
                choices[row.place].add(name, counts)
    steps = sum(chosen.steps for chosen in choices)
    return Drafting(
        answers=answers,
        per_step=tokens / steps if steps else None,
        drafters=[tally.drafter(*key) for key, tally in sorted(tallies.items(), key=_by_drafts)],
        choices=[chosen.choice(span) for chosen, span in zip(choices, seen.spans, strict=True)],
    )


def of_answer(logged: Interaction) -> list[Drafter]:
    """The drafters of one answer."""
    tallies = {name: counts for name, counts in (logged.speculation or {}).items() if name != "steps"}
    return [
        _tallied([counts]).drafter(name, logged.speculator_digest if name == "heads" else None)
        for name, counts in sorted(tallies.items(), reverse=True)
    ]


def response_tokens(session: Session, project_id: UUID, most: int) -> int:
    """Tokens of the project's newest live answers, counted until `most`: of a few, and of many only if need be."""
    few = _newest_tokens(session, project_id, FEW_ROWS)
    return min(most, few if few >= most else _newest_tokens(session, project_id, COUNTED_ROWS))


def _newest_tokens(session: Session, project_id: UUID, rows: int) -> int:
    newest = (
        select(Interaction.completion_tokens.label("tokens"))
        .where(Interaction.project_id == project_id, Interaction.origin == "live")
        .order_by(Interaction.id.desc())
        .limit(rows)
        .subquery()
    )
    return int(session.scalar(select(func.coalesce(func.sum(newest.c.tokens), 0))) or 0)


@dataclass
class Tally:
    """One drafter's documents added up."""

    drafts: int = 0
    drafted: int = 0
    accepted: list[int] = field(default_factory=list)

    def add(self, counts: Mapping[str, Any]) -> None:
        self.drafts += counts["drafts"]
        self.drafted += _drafted(counts)
        self.accepted.extend([0] * (len(counts["accepted"]) - len(self.accepted)))
        for position, count in enumerate(counts["accepted"]):
            self.accepted[position] += count

    def drafter(self, name: str, digest: str | None) -> Drafter:
        reached = [count / self.drafts for count in self.accepted]
        return Drafter(name, digest, self.drafts, self.drafted, sum(self.accepted), reached)


@dataclass
class Chosen:
    """A span's steps by the drafter whose draft they went on with."""

    steps: int = 0
    drafts: int = 0
    drafted: int = 0
    won: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, counts: Mapping[str, Any]) -> None:
        self.drafts += counts["drafts"]
        self.drafted += _drafted(counts)
        self.won[name] = self.won.get(name, 0) + counts.get("won", counts["drafts"])

    def choice(self, span: tuple[datetime, datetime]) -> Choice:
        steps = max(self.steps, sum(self.won.values()), 1)
        suffix, heads = (self.won.get(name, 0) / steps for name in ("suffix", "heads"))
        length = self.drafted / self.drafts if self.drafts else None
        return Choice(span[0] + (span[1] - span[0]) / 2, self.steps, suffix, heads, 1 - suffix - heads, length)


def _tallied(documents: Iterable[Mapping[str, Any]]) -> Tally:
    tally = Tally()
    for counts in documents:
        tally.add(counts)
    return tally


def _drafted(counts: Mapping[str, Any]) -> int:
    return sum(length * count for length, count in enumerate(counts["lengths"]))


def _by_drafts(entry: tuple[tuple[str, str | None], Tally]) -> tuple[bool, int]:
    (name, _), tally = entry
    return name == "heads", -tally.drafts


def _documents(project_id: UUID, seen: Window) -> Select[Any]:
    spans = spans_of(seen)
    newest = (
        select(Interaction.completion_tokens, Interaction.speculation, Interaction.speculator_digest)
        .where(*answers_in(project_id, spans), Interaction.speculated, Interaction.completion_tokens > 0)
        .order_by(Interaction.id.desc())
        .limit(MOST_ROWS)
        .lateral("newest")
    )
    return select(spans.c.place, newest).select_from(spans.join(newest, true()))
