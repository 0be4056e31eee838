"""What is sent: prompts of exact lengths, the same for every server, and how many of them fill a measurement."""

import random
from collections.abc import Sequence


def make_prompts(words: Sequence[str], length: int, count: int, seed: object) -> list[str]:
    """Prompts of exactly `length` tokens that share no beginning worth caching, the same for a seed."""
    draw = random.Random(str(seed))
    return ["".join(draw.choices(words, k=length)) for _ in range(count)]


def parse_shape(text: str) -> tuple[int, int]:
    """`350/50`: tokens of the prompt and of the answer."""
    prompt, _, answer = text.partition("/")
    return int(prompt), int(answer)


def waves_to_fill(seconds: float, one: float, *, most: int) -> int:
    """How many waves of requests that take as long as `one` fill the time: at least one."""
    return max(1, min(most, round(seconds / one)))
