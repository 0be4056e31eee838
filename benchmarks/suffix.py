"""The suffix drafter's price: memory of a full corpus, time of a proposal and of learning an answer.

    python -m benchmarks.suffix

Answers are chains over 2,000 words that repeat each other in parts, 80 tokens each; a second corpus of noise, in which
every n-gram is new, is the most that memory and tables can come to. Microseconds are medians of this thread's processor
time, which a busy machine does not stretch; `most` is 8.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil

from engine.layers.sampler import Draw
from engine.messages import Sampling
from engine.speculation.corpora import Corpora, Memory, propose

TOKENS, ANSWER, PROMPT, WORDS, MOST = 1 << 20, 80, 300, 2000, 8
ROWS, CALLS = (1, 16, 64), 300


def resident_mb() -> float:
    """Resident memory of this process."""
    return float(psutil.Process().memory_info().rss) / 2**20


class Filled(NamedTuple):
    """What filling a corpus took: microseconds per answer (median and longest), memory by the system and by count."""

    median: float
    longest: float
    resident_mb: float
    counted_mb: float


def phrases(generator: random.Random) -> Iterator[list[int]]:
    """Answers put together from 3,000 phrases of 3 to 12 words."""
    known = [generator.choices(range(WORDS), k=generator.randint(3, 12)) for _ in range(3000)]
    while True:
        answer: list[int] = []
        while len(answer) < ANSWER:
            answer += generator.choice(known)
        yield answer[:ANSWER]


def noise(generator: random.Random) -> Iterator[list[int]]:
    """Answers without anything that repeats, over the vocabulary of a large model."""
    while True:
        yield generator.choices(range(1 << 17), k=ANSWER)


def fill(corpora: Corpora, name: str, answers: Iterator[list[int]]) -> Filled:
    """Learn a corpus' capacity and half of it again."""
    before = resident_mb()
    times = []
    for _ in range(3 * TOKENS // (2 * (ANSWER + 1))):
        answer = next(answers)
        start = time.thread_time()
        corpora.learn(name, answer)
        times.append(1e6 * (time.thread_time() - start))
    counted = next(each.bytes for each in corpora.status() if each.namespace == name)
    return Filled(statistics.median(times), max(times), resident_mb() - before, counted / 2**20)


def median_time(call: Callable[[], object], prepare: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        prepare()
        start = time.thread_time()
        call()
        times.append(1e6 * (time.thread_time() - start))
    return statistics.median(times)


def requests(corpora: Corpora, answers: Iterator[list[int]], rows: int) -> list[Memory]:
    """Requests in the middle of an answer, their prompts of phrases too."""
    made = []
    for _ in range(rows):
        prompt = [token for _ in range(PROMPT // ANSWER + 1) for token in next(answers)][:PROMPT]
        made.append(corpora.open("phrases", prompt + next(answers)[: ANSWER // 2]))
    return made


def main() -> None:
    """Print the tables."""
    generator = random.Random(0)
    corpora = Corpora(capacity=TOKENS)
    print(f"{'corpus':10} {'learn µs':>9} {'longest µs':>11} {'resident MB':>12} {'counted MB':>11}")
    for name, answers in (("phrases", phrases(random.Random(1))), ("noise", noise(random.Random(2)))):
        filled = fill(corpora, name, answers)
        times = f"{filled.median:9.1f} {filled.longest:11.0f}"
        print(f"{name:10} {times} {filled.resident_mb:12.1f} {filled.counted_mb:11.1f}")
    print(f"\n{'rows':>4} {'greedy µs':>10} {'drawn µs':>9} {'extend µs':>10} {'tokens drafted a row':>21}")
    for rows in ROWS:
        memories = requests(corpora, phrases(random.Random(1)), rows)
        draws = [Draw(Sampling(seed=row, temperature=0.7, max_tokens=1), 0, 40) for row in range(rows)]
        lengths = [len(each.tokens) for each in propose(memories, [None] * rows, [MOST] * rows)]

        def extend(memories: list[Memory] = memories) -> None:
            for memory in memories:
                memory.extend(generator.choices(range(WORDS), k=2))

        def step(memories: list[Memory] = memories, rows: int = rows) -> object:
            return propose(memories, [None] * rows, [MOST] * rows)

        def drawn(memories: list[Memory] = memories, draws: list[Draw] = draws, rows: int = rows) -> object:
            return propose(memories, draws, [MOST] * rows)

        print(
            f"{rows:4} {median_time(step, lambda: None):10.1f} {median_time(drawn, lambda: None):9.1f} "
            f"{median_time(extend, lambda: None):10.1f} {statistics.mean(lengths):21.1f}"
        )


if __name__ == "__main__":
    main()
