"""Names and places in text by Presidio, for projects that ask for it (`pii_names`): the extra `pii` installs it.

Its models are no patterns: another version of them may find other names, so a build after it may give another revision.
What is built stays as it is.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

from services.errors import Unprocessable
from services.store import pii
from services.store.pii import Found

# What no pattern can know; for the rest patterns with checksums are surer.
KINDS = {"PERSON": "name", "LOCATION": "place"}
LEAST_SCORE = 0.5
LANGUAGE = "en"
MISSING = "this project looks for names (pii_names), which needs Presidio: pip install 'whet[pii]'"


def finder_of(config: dict[str, Any]) -> pii.Finder:
    """What a project looks for. Raises Unprocessable when that takes Presidio and it is not installed."""
    if not config.get("pii_names") or pii.mode_of(config) == "off":
        return pii.find
    if find_spec("presidio_analyzer") is None:
        raise Unprocessable(MISSING)
    return find


def find(text: str) -> list[Found]:
    """What the patterns find, and names and places beside it, in order, without overlaps."""
    taken = pii.find(text)
    if not text.strip():
        return taken
    told = _analyzer().analyze(text=text, language=LANGUAGE, entities=list(KINDS))
    for one in sorted(told, key=lambda each: (-each.score, each.start, -each.end)):
        apart = all(one.end <= other.start or other.end <= one.start for other in taken)
        if one.score >= LEAST_SCORE and one.entity_type in KINDS and apart:
            taken.append(Found(KINDS[one.entity_type], one.start, one.end))
    return sorted(taken, key=lambda each: each.start)


@cache
def _analyzer() -> Any:  # noqa: ANN401 - Presidio ships no types
    """Loading it takes seconds and hundreds of megabytes: once a process, when first needed."""
    from presidio_analyzer import AnalyzerEngine

    return AnalyzerEngine()
