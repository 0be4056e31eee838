"""What drafting earned a project: decode rates of answers with drafts and of the baseline's, which has none.

Everything looks at one window of at most a day, cut into equal spans, and at a bounded number of rows of each: the
newest ones, found by the index on (project, id). Callers keep the answers for a while. Baseline answers share steps
with drafted ones: for one stream at a time the ratio is exact, where many share steps it flatters.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Float, Integer, Select, Uuid, Values, cast, column, func, select, true, values
from sqlalchemy.orm import Session

from services.store.models import Interaction
from services.store.pages import first_id

LONGEST = timedelta(days=1)
SHORTEST = timedelta(minutes=5)
SPANS = 24
# Rows that are read of a span.
MOST_ROWS = 2000
# A rate over fewer tokens says more about the clock than about the machine.
LEAST_TOKENS = 8
# Answers on either side before they are compared.
LEAST_COMPARED = 5
FINISHED = ("stop", "length")


class Window(NamedTuple):
    """A stretch of time and its equal spans, oldest first, as (begin, end)."""

    since: datetime
    until: datetime
    spans: list[tuple[datetime, datetime]]


class Rate(NamedTuple):
    """Decode tokens a second of one stream, over so many answers; the 95 % interval needs two of them."""

    answers: int
    value: float
    low: float | None
    high: float | None


class Gain(NamedTuple):
    """How many times faster, with its 95 % interval."""

    times: float
    low: float
    high: float


class Span(NamedTuple):
    """One point of the plot: its middle, and the rates of answers with drafts and of the baseline."""

    at: datetime
    drafted: Rate | None
    plain: Rate | None


class Speed(NamedTuple):
    """A project's window. `gain` is unknown while either side has fewer than LEAST_COMPARED answers."""

    window: Window
    spans: list[Span]
    drafted: Rate | None
    plain: Rate | None
    gain: Gain | None

    @property
    def compared(self) -> int:
        """How many baseline answers there are."""
        return self.plain.answers if self.plain else 0


def window(session: Session, project_id: UUID, now: datetime | None = None) -> Window:
    """The last day, or the time since the project's first answer in it: a young project's plot must not be empty."""
    until = now or datetime.now(UTC)
    earliest = (
        select(Interaction.started_at)
        .where(Interaction.project_id == project_id, Interaction.id >= first_id(until - LONGEST))
        .order_by(Interaction.id)
        .limit(1)
    )
    since = min(session.scalar(earliest) or until, until - SHORTEST)
    step = (until - since) / SPANS
    return Window(since, until, [(since + step * place, since + step * (place + 1)) for place in range(SPANS)])


def measure(session: Session, project_id: UUID) -> Speed:
    """Rates in each span and over the whole window."""
    seen = window(session, project_id)
    sums: dict[tuple[int, bool], Sums] = {}
    for row in session.execute(_rates(project_id, seen)):
        sums[row.place, row.speculated] = Sums(*row[2:])
    spans = [
        Span(begin + (end - begin) / 2, _rate(sums.get((place, True))), _rate(sums.get((place, False))))
        for place, (begin, end) in enumerate(seen.spans)
    ]
    drafted, plain = (
        _total(part for (_, speculated), part in sums.items() if speculated is side) for side in (True, False)
    )
    return Speed(seen, spans, _rate(drafted), _rate(plain), _gain(drafted, plain))


def of_answer(logged: Interaction) -> float | None:
    """Decode tokens a second of one answer; None where it is too short to tell."""
    if logged.ttft_ms is None or logged.latency_ms is None or logged.latency_ms <= logged.ttft_ms:
        return None
    seconds = (logged.latency_ms - logged.ttft_ms) / 1000
    return (logged.completion_tokens - 1) / seconds if logged.completion_tokens >= LEAST_TOKENS else None


# --- rates ------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Of answers' tokens after the first (t) and the seconds they took (s): how many, Σt, Σs, Σt², Σts, Σs²."""

    answers: int
    t: float
    s: float
    tt: float
    ts: float
    ss: float

    @property
    def rate(self) -> float:
        return self.t / self.s

    @property
    def spread(self) -> float | None:
        """Standard error of the rate relative to it, as of a ratio of sums; None for a single answer."""
        if self.answers < 2:
            return None
        squares = self.tt - 2 * self.rate * self.ts + self.rate**2 * self.ss
        return math.sqrt(max(0.0, squares) * self.answers / (self.answers - 1)) / self.t


def _total(parts: Iterable[Sums]) -> Sums | None:
    columns = list(zip(*parts, strict=True))
    return Sums(*map(sum, columns)) if columns else None


def _rate(sums: Sums | None) -> Rate | None:
    if sums is None:
        return None
    if sums.spread is None:
        return Rate(sums.answers, sums.rate, None, None)
    reach = _quantile(sums.answers) * sums.spread
    return Rate(sums.answers, sums.rate, max(0.0, sums.rate * (1 - reach)), sums.rate * (1 + reach))


def _gain(drafted: Sums | None, plain: Sums | None) -> Gain | None:
    if drafted is None or plain is None or min(drafted.answers, plain.answers) < LEAST_COMPARED:
        return None
    times = drafted.rate / plain.rate
    reach = _quantile(min(drafted.answers, plain.answers)) * math.hypot(drafted.spread or 0.0, plain.spread or 0.0)
    return Gain(times, times * math.exp(-reach), times * math.exp(reach))


def _quantile(answers: int) -> float:
    """97.5 % point of Student's t with one degree of freedom less than answers, expanded around the normal's."""
    freedom = answers - 1
    return 1.96 + 2.372 / freedom + 2.823 / freedom**2


def _rates(project_id: UUID, seen: Window) -> Select[Any]:
    spans = spans_of(seen)
    t = cast(Interaction.completion_tokens - 1, Float)
    s = (Interaction.latency_ms - Interaction.ttft_ms) / 1000
    timed = (
        select(Interaction.speculated, t.label("t"), s.label("s"))
        .where(
            *answers_in(project_id, spans),
            Interaction.completion_tokens >= LEAST_TOKENS,
            Interaction.latency_ms > Interaction.ttft_ms,
        )
        .order_by(Interaction.id.desc())
        .limit(MOST_ROWS)
        .lateral("timed")
    )
    one = timed.c
    sums = [func.sum(term) for term in (one.t, one.s, one.t * one.t, one.t * one.s, one.s * one.s)]
    return (
        select(spans.c.place, one.speculated, func.count(), *sums)
        .select_from(spans.join(timed, true()))
        .group_by(spans.c.place, one.speculated)
    )


def answers_in(project_id: UUID, spans: Values) -> Sequence[ColumnElement[bool]]:
    """Live answers that came to an end of their own, of the span a row of `spans` stands for."""
    return (
        Interaction.project_id == project_id,
        Interaction.id >= spans.c.first,
        Interaction.id < spans.c.behind,
        Interaction.origin == "live",
        Interaction.finish_reason.in_(FINISHED),
    )


def spans_of(seen: Window) -> Values:
    """The window's spans as rows of (place, first id, first id behind it)."""
    rows = [(place, first_id(begin), first_id(end)) for place, (begin, end) in enumerate(seen.spans)]
    names = (column("place", Integer), column("first", Uuid), column("behind", Uuid))
    return values(*names, name="spans").data(rows)
