"""Regular expressions that strangers write, searched in time that grows with the text and no faster.

The engine is the Rust `regex` crate inside pydantic: no backtracking, so no pattern takes for ever. It knows neither
look-around nor back references, and refuses them. What is left to bound is counted repetition, which multiplies the
work: with these limits the worst pattern takes about half a second on the longest text that is searched.
"""

import re
from functools import lru_cache
from math import prod

from pydantic_core import SchemaError, SchemaValidator, ValidationError
from pydantic_core.core_schema import str_schema

LONGEST_PATTERN = 300
MOST_REPEATS = 200
LONGEST_TEXT = 20_000
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")


def flaw(pattern: str) -> str | None:
    """Why a pattern cannot be used, in a sentence; None when it can."""
    if len(pattern) > LONGEST_PATTERN:
        return f"a pattern has at most {LONGEST_PATTERN} characters, not {len(pattern)}"
    counts = [max(int(low[:6] or 0), int(high[:6] or 0), 1) for low, high in _COUNTED.findall(pattern)]
    if prod(counts) > MOST_REPEATS:
        return f"the counted repetitions of a pattern may multiply to {MOST_REPEATS} at most"
    try:
        _compiled(pattern)
    except SchemaError as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"this is no pattern that can be searched safely: {told[-1].removeprefix('error: ')}"
    return None


def found(pattern: str, text: str) -> bool:
    """Whether the pattern matches anywhere in the first 20,000 characters. Raises ValueError for an unusable one."""
    problem = flaw(pattern)
    if problem is not None:
        raise ValueError(problem)
    try:
        # Half of a surrogate pair is no text to this engine; what cannot be read matches nothing there.
        _compiled(pattern).validate_python(text[:LONGEST_TEXT].encode("utf-8", "replace").decode())
    except ValidationError:
        return False
    return True


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> SchemaValidator:
    return SchemaValidator(str_schema(pattern=pattern, regex_engine="rust-regex"))
