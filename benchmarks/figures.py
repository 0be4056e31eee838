"""What the small benchmarks share: prompts, repeated runs in turns, and figures as JSON lines."""

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STARTER = Path(__file__).parents[1] / "engine" / "starter"
DTYPES = {"bf16": 2, "fp32": 4, "int8": 2}


def config_of(model: Path) -> dict[str, Any]:
    """The model's config.json."""
    loaded: dict[str, Any] = json.loads((model / "config.json").read_text())
    return loaded


def random_prompts(model: Path, count: int, length: int, seed: object) -> list[list[int]]:
    """Token ids that mean nothing and share no beginning, the same for a seed."""
    draw = random.Random(str(seed))
    vocabulary = config_of(model)["vocab_size"]
    return [[draw.randrange(8, vocabulary) for _ in range(length)] for _ in range(count)]


def timed(action: Callable[[], object]) -> float:
    """Seconds an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def in_turns(actions: Mapping[str, Callable[[int], float]], repeats: int) -> dict[str, list[float]]:
    """Each action's results; they take turns, so that a machine that slows down slows all. The first turn warms up."""
    runs = [{name: action(turn) for name, action in actions.items()} for turn in range(repeats + 1)]
    return {name: [run[name] for run in runs[1:]] for name in actions}


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Median, minimum, maximum."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}


def show(**fields: object) -> None:
    """One JSON line."""
    print(json.dumps(fields), flush=True)


def load_average() -> float:
    """Over the last minute: above a few tenths, absolute figures are worth little."""
    return round(os.getloadavg()[0], 2)
