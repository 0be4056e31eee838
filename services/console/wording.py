"""Figures and times in words, for people; every template filter of the console is here."""

import json
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from services.store.reviews import QUEUE_COUNTED_TO
from services.store.search import SHORTEST_PREFIX

STRATEGIES = {
    "negative_feedback": "negative feedback",
    "low_confidence": "low confidence",
    "schema_failure": "schema failure",
    "disagreement": "disagreement",
    "novelty": "novelty",
    "uniform": "uniform audit",
    "chosen": "chosen by hand",
}
VERDICTS = {
    "accept": "accepted",
    "correct": "corrected",
    "reject": "rejected",
    "prefer": "preferred",
    "skip": "skipped",
    "escalate": "escalated",
    "undo": "undone",
}
SPLITS = {"train": "train", "held_out": "held-out"}


def short(digest: str | None, length: int = 10) -> str:
    """A digest as people recognise it; no digest is the base model."""
    return digest[:length] if digest else "base"


def count(value: float | None) -> str:
    """1284 as 1,284."""
    return "–" if value is None else f"{value:,.0f}"


def capped(value: int) -> str:
    """A count that stopped at a limit, as "10,000+"."""
    return f"{value:,}+" if value >= QUEUE_COUNTED_TO else f"{value:,}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "–" if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def figure(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant places, or all places before the point."""
    if value is None:
        return "–"
    if 10**digits <= abs(value) < 1e9:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def milliseconds(value: float | None) -> str:
    """A duration given in milliseconds."""
    return "–" if value is None else duration(value / 1000)


def duration(seconds: float | None) -> str:
    """A duration in the unit that suits it."""
    if seconds is None:
        return "–"
    if seconds < 0.0995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """How long since a moment, coarsely."""
    if moment is None:
        return "never"
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "min"), (86_400, 3600, "h"), (float("inf"), 86_400, "d")):
        if seconds < limit:
            return "just now" if seconds < 5 else f"{int(seconds // size)} {unit} ago"
    raise AssertionError("every span is below infinity")


def stamp(moment: datetime | None) -> str:
    """A moment in UTC, for a tooltip or a table."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if moment else "–"


def minute(moment: datetime | None) -> str:
    """A moment in UTC where a second more or less says nothing."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if moment else "–"


def until(moment: datetime, now: datetime | None = None) -> str:
    """How long until a moment, coarsely."""
    left = (moment - (now or datetime.now(UTC))).total_seconds()
    for limit, size, unit in ((5400, 60, "min"), (36 * 3600, 3600, "h"), (float("inf"), 86_400, "d")):
        if left < limit:
            return f"in {max(1, round(left / size))} {unit}"
    raise AssertionError("every span is below infinity")


def iso(moment: datetime | None) -> str:
    """A moment for a `datetime` attribute."""
    return moment.isoformat() if moment else ""


def took(start: datetime | None, end: datetime | None) -> str:
    """From one moment to another, or to now while there is no end."""
    return duration(((end or datetime.now(UTC)) - start).total_seconds()) if start else "–"


def last_part(identity: object) -> str:
    """The end of an id: ids made close together begin alike."""
    return str(identity)[-6:]


def sentence(text: str) -> str:
    """A text with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def plain(value: object) -> str:
    """A value of a JSON document on one line: lists and documents without their brackets, where that is enough."""
    if isinstance(value, list):
        return " ".join(plain(one) for one in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return {True: "yes", False: "no", None: "nothing"}[value] if isinstance(value, bool | None) else str(value)


def content_text(content: object) -> str:
    """A message's content as text: plain strings as they are, parts joined, anything else as JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return "\n".join(str(part["text"]) for part in content)
    return "" if content is None else pretty(content)


def pretty(value: object) -> str:
    """A document as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


EXCERPT = 240


class Piece(NamedTuple):
    """A stretch of an excerpt, and whether it is what was looked for."""

    text: str
    hit: bool


def excerpt(text: str | None, words: str = "") -> list[Piece]:
    """The part of a text where the words stand, else its beginning; the words marked, and longer ones that begin with
    them, as the search finds them."""
    whole = text or ""
    sought = [word for word in re.findall(r"(?<![-\w])\w+", words) if word.lower() != "or"][:20]
    if not sought:
        return [Piece(whole[:EXCERPT], hit=False)]
    marked = (re.escape(word) + (r"\w*" if len(word) >= SHORTEST_PREFIX else r"\b") for word in sought)
    pattern = re.compile(r"\b(?:" + "|".join(marked) + ")", re.IGNORECASE)
    first = pattern.search(whole)
    start = max(0, first.start() - EXCERPT // 4) if first and first.end() > EXCERPT else 0
    cut = ("…" if start else "") + whole[start : start + EXCERPT]
    pieces, at = [], 0
    for match in pattern.finditer(cut):
        pieces += [Piece(cut[at : match.start()], hit=False), Piece(match.group(), hit=True)]
        at = match.end()
    return [piece for piece in [*pieces, Piece(cut[at:], hit=False)] if piece.text]


ARROWS = {"ArrowLeft": "←", "ArrowRight": "→", "ArrowUp": "↑", "ArrowDown": "↓"}


def keycap(key: str) -> str:
    """A key as its cap shows it."""
    return ARROWS.get(key, key)


def evidence(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What an event was decided on, as pairs of a name and a figure; what says nothing to people is left out."""
    told = []
    for name, value in found.items():
        if name in UNTOLD or value is None or isinstance(value, dict):
            continue
        told.append((EVIDENCE.get(name, name.replace("_", " ")), _evidence(name, value)))
    return told


# Said elsewhere of an event: what it changed, its links, the gate's reasons; or said to the machine alone.
UNTOLD = ("states", "run_id", "evaluation", "reasons", "left_with_adapter")
EVIDENCE = {
    "before": "share before", "differ": "answers that differ", "share_seen": "share that came",
    "golden_prompts": "golden prompts", "differing": "golden prompts that differ",
    "target": "points on the target slice",
}  # fmt: skip
SHARES = (
    "share",
    "before",
    "share_seen",
    "differ",
    "live_failing",
    "candidate_failing",
    "live_refuses",
    "candidate_refuses",
)


def _evidence(name: str, value: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, int | float | None) for one in value):
        return _figures([_evidence(name, one) for one in value])
    if isinstance(value, list):
        return str(len(value))
    if value is None:
        return "?"
    if name == "target":
        return points(value)
    return percent(value, 0) if name in SHARES else count(value) if isinstance(value, int) else figure(value, 4)


def _figures(told: list[str]) -> str:
    """Two sides, the new one first; or an estimate with its interval."""
    return f"{told[0]} ({told[1]} to {told[2]})" if len(told) == 3 else " against ".join(told)


FILTERS: dict[str, Any] = {
    "evidence": evidence,
    "short": short, "count": count, "capped": capped, "percent": percent, "points": points,
    "figure": figure, "ms": milliseconds, "excerpt": excerpt, "keycap": keycap,
    "duration": duration, "ago": ago, "stamp": stamp, "minute": minute,
    "until": until, "iso": iso, "plain": plain,
    "last_part": last_part, "sentence": sentence, "content_text": content_text, "pretty": pretty,
    "strategy": lambda name: STRATEGIES.get(name, name),
    "verdict": lambda name: VERDICTS.get(name, name),
    "split": lambda name: SPLITS.get(name, name),
}  # fmt: skip
