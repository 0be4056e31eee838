"""What drafting earns on a GPU, CUDA graphs and all: the model of benchmarks/gpu.py, acceptance forced.

A bias makes the answer one token repeated, which the suffix drafter foresees; a share of its drafted tokens is then
spoilt at random. So the whole forward is computed, every draft is verified, and acceptance is what was asked for. The
policy is the engine's own and has to find out. How much comes out of real traffic, `python -m benchmarks.speculation`
says, which runs on the GPU too where there is one.
"""

import random
import time
from collections.abc import Sequence as Many
from itertools import count
from pathlib import Path

from benchmarks.figures import random_prompts
from benchmarks.speculation_world import Rate, interval
from engine.messages import Generate, Sampling
from engine.offline import LocalEngine
from engine.speculation.policy import Adaptive, Batch
from engine.speculation.tries import Try

SHARES, BATCHES, PAIRS = (0.6, 0.8, 0.9), (1, 4, 16, 64), 6
REPEATED, BIAS, SHORT = 9, 100.0, 4

_turns = count()


class Forced(Adaptive):
    """The engine's policy over drafts of which each token is right with probability `share`."""

    branches = False

    def __init__(self, share: float, vocabulary: int, seed: int = 0) -> None:
        self.share, self.vocabulary = share, vocabulary
        self._random = random.Random(seed)

    def select(self, tries: Many[Many[Try]], batch: Batch, *, drafting: bool) -> list[tuple[Try | None, int]]:
        """See Policy. Spoils the proposals where they lie, so that they are counted as what they were."""
        for each in tries:
            for one in each:
                for place, token in enumerate(one.tokens):
                    if self._random.random() >= self.share:
                        one.tokens[place] = (token + 1) % self.vocabulary
        return super().select(tries, batch, drafting=drafting)


def measure(
    engine: LocalEngine, model: Path, prompt: int, tokens: int, *, batches: Many[int] = BATCHES, pairs: int = PAIRS
) -> list[dict[str, float]]:
    """Decode rate with drafts over that without, in turns, for every batch and acceptance; the first turn warms up."""
    found = []
    for batch in batches:
        for share in SHARES:
            engine.core.drafting.policy = Forced(share, engine.core.forward.spec.vocab_size)
            rates: list[tuple[Rate, Rate]] = []
            drafted = accepted = 0
            for turn in range(pairs + 1):
                texts = random_prompts(model, batch, prompt, f"forced {batch} {share} {turn}")
                plain, _, _ = decoded(engine, texts, tokens, share, speculate=False)
                ours, more, came = decoded(engine, texts, tokens, share, speculate=True)
                if turn:
                    rates.append((ours, plain))
                    drafted, accepted = drafted + more, accepted + came
            ratio, low, high = interval(rates)
            found.append({
                "batch": batch, "forced": share, "ratio": round(ratio, 3), "low": round(low, 3), "high": round(high, 3),
                "drafted_a_token": round(drafted / (pairs * batch * tokens), 2),
                "accepted": round(accepted / max(1, drafted), 3),
            })  # fmt: skip
    engine.core.drafting.policy = Adaptive()
    return found


def decoded(
    engine: LocalEngine, texts: Many[list[int]], tokens: int, share: float, *, speculate: bool
) -> tuple[Rate, int, int]:
    """Tokens behind the first ones and the seconds they took: a long run less a short one. Drafted, accepted tokens."""

    def run(length: int) -> tuple[float, int, int]:
        sampling = Sampling(temperature=0.0, seed=0, max_tokens=length, min_tokens=length, logit_bias={REPEATED: BIAS})
        requests = [
            Generate(
                id=f"forced-{next(_turns)}", prompt=text, sampling=sampling, namespace=f"forced {share}",
                cache_salt=f"{next(_turns)}", speculate=speculate, learn=False,
            )
            for text in texts
        ]  # fmt: skip
        began = time.perf_counter()
        answers = engine.generate(requests)
        seconds = time.perf_counter() - began
        assert all(len(answer.token_ids) == length for answer in answers), "an answer ended early"
        ends = [answer.finished for answer in answers]
        return seconds, sum(end.drafted_tokens for end in ends), sum(end.accepted_tokens for end in ends)

    short, _, _ = run(SHORT)
    long, drafted, accepted = run(tokens)
    return (len(texts) * (tokens - SHORT), max(long - short, 1e-9)), drafted, accepted
