"""Scores of one output against the golden answer, each in [0, 1], higher is better. A project's `metrics` names them.

Outputs and golden answers are hostile text: nothing here raises on any of it, and nothing takes long.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from services.store import schemas
from services.store.evaluation_config import CheckConfig

LONGEST_COMPARED = 20_000


class Said(NamedTuple):
    """An answer, with what the engine and the judge made of it where they were asked."""

    text: str
    likelihood: float | None = None
    judged: float | None = None


class Wanted(NamedTuple):
    """What an answer is held against: the golden text, the project's schema (a JSON text) and its checks."""

    golden: str
    schema: str | None = None
    checks: Sequence[CheckConfig] = ()


Metric = Callable[[Said, Wanted], float]


def exact_match(output: str, golden: str) -> float:
    """Equal, white space at the ends aside."""
    return float(output.strip() == golden.strip())


def json_valid(output: str, golden: str) -> float:  # noqa: ARG001 - every comparison sees both
    """Whether the output is JSON at all."""
    return float(_parse(output) is not None)


def field_f1(output: str, golden: str) -> float:
    """F1 over the leaves of two JSON documents, as (path, value) pairs; order in lists does not count."""
    parsed, wanted = _parse(output), _parse(golden)
    said, meant = _leaves(parsed), _leaves(wanted)
    if not said or not meant:
        # Two documents without leaves agree; text that is no JSON agrees with nothing.
        return float(said == meant and parsed is not None and wanted is not None)
    return 2 * (said & meant).total() / (said.total() + meant.total())


def similarity(output: str, golden: str) -> float:
    """1 - edit distance / length of the longer, in characters; texts are compared up to 20,000 of them."""
    one, other = output.strip()[:LONGEST_COMPARED], golden.strip()[:LONGEST_COMPARED]
    longer = max(len(one), len(other))
    return 1.0 if longer == 0 else 1 - edit_distance(one, other) / longer


def schema_valid(said: Said, wanted: Wanted) -> float:
    """Whether the output keeps the project's `response_schema`; without one, or with one that cannot be judged by,
    nothing breaks it."""
    return float(wanted.schema is None or not schemas.fails(said.text, wanted.schema))


def likelihood(said: Said, wanted: Wanted) -> float:  # noqa: ARG001 - every metric sees both
    """How likely the golden answer was, as the geometric mean of its tokens' probabilities."""
    return said.likelihood or 0.0


def checks(said: Said, wanted: Wanted) -> float:
    """The share of the project's checks that the output passes."""
    passed = [check.passes(said.text) for check in wanted.checks]
    return sum(passed) / len(passed) if passed else 1.0


def judge(said: Said, wanted: Wanted) -> float:  # noqa: ARG001 - every metric sees both
    """1 where the judge preferred this answer in both orders, 0 where the other one, 0.5 where it did neither."""
    return 0.5 if said.judged is None else said.judged


def of_texts(compare: Callable[[str, str], float]) -> Metric:
    """A metric that looks at the two texts alone."""
    return lambda said, wanted: compare(said.text, wanted.golden)


METRICS: dict[str, Metric] = {
    "exact_match": of_texts(exact_match),
    "json_valid": of_texts(json_valid),
    "schema_valid": schema_valid,
    "field_f1": of_texts(field_f1),
    "similarity": of_texts(similarity),
    "likelihood": likelihood,
    "checks": checks,
    "judge": judge,
}


def choose(names: Sequence[str]) -> dict[str, Metric]:
    """The named metrics, the deciding one first. Raises ValueError for none or an unknown name."""
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"unknown metrics {unknown}: choose from {', '.join(METRICS)}")
    return {name: METRICS[name] for name in names}


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance by Myers' bit vectors (J. ACM 1999, in Hyyrö's form): a column of the table is one int."""
    if not one:
        return len(other)
    where: dict[str, int] = {}
    for index, character in enumerate(one):
        where[character] = where.get(character, 0) | 1 << index
    everything, last = (1 << len(one)) - 1, 1 << len(one) - 1
    up, down, distance = everything, 0, len(one)
    for character in other:
        same = where.get(character, 0)
        diagonal = ((same & up) + up ^ up) | same | down
        right, left = down | ~(diagonal | up), up & diagonal
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up, down = (left | ~(diagonal | right)) & everything, right & diagonal & everything
    return distance


def _parse(text: str) -> object:
    """The JSON value, or None; a top-level null is as good as none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _leaves(value: object) -> Counter[tuple[str, str]]:
    """Leaves of a parsed document; list positions are left out of the path."""
    found: Counter[tuple[str, str]] = Counter()
    waiting: list[tuple[str, object]] = [("", value)] if value is not None else []
    while waiting:
        path, one = waiting.pop()
        if isinstance(one, dict):
            waiting += [(f"{path}/{key}", item) for key, item in one.items()]
        elif isinstance(one, list):
            waiting += [(f"{path}/*", item) for item in one]
        else:
            found[path, json.dumps(one)] += 1
    return found
