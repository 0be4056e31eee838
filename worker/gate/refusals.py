"""Whether an answer declines to answer. Reported beside the scores, never decided by: it is a list of phrases."""

import re

LOOKED_AT = 200
_DECLINES = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able|afraid)|i (?:cannot|can't|can not|won't|will not) (?:help|assist|do|"
    r"provide|answer|comply|fulfil)|as an ai\b|unable to (?:help|assist|answer|comply))",
    re.IGNORECASE,
)


def refuses(text: str) -> bool:
    """By how it begins; support desks say that they are sorry and help all the same, so "sorry" takes a "but"."""
    beginning = text[:LOOKED_AT].replace("\u2019", "'")
    match = _DECLINES.search(beginning)
    if match is None:
        return False
    return "sorry" not in match.group().lower() or " but " in beginning[match.end() :].lower()
