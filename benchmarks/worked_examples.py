"""Do worked examples help the starter model? House rules kept without them, with the nearest, and with random ones.

    python -m benchmarks.worked_examples [--prompts 100] [--corrections 300]

The placing and the choice are the gateway's own code; only the engine is in this process.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from uuid import UUID

import numpy as np

from engine.messages import Sampling
from engine.offline import LocalEngine
from engine.text.tokenizer import Tokenizer
from examples.evaluate_starter import judged
from examples.grammars.common import Application, Example, stream
from examples.grammars.simulate import APPLICATIONS
from services.gateway.instant import Mark, Shelf
from services.gateway.planning import Worked, placed
from services.gateway.worked import nearest
from services.store.instant_config import WorkedConfig
from services.store.worked import question_of, read_tokens, shown_of

STARTER = Path("engine/starter")
Choose = Callable[[Example], Sequence[Worked]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--corrections", type=int, default=300)
    parser.add_argument("--apps", nargs="+", default=list(APPLICATIONS), choices=list(APPLICATIONS))
    options = parser.parse_args()
    tokenizer = Tokenizer.load(STARTER)
    print(f"{'application':12} {'worked examples':18} {'house rules kept':24} {'base rules kept':24} prompt tokens")
    with LocalEngine(STARTER, threads=1) as engine:
        for app in options.apps:
            measure(engine, tokenizer, APPLICATIONS[app], options.prompts, options.corrections)


def measure(engine: LocalEngine, tokenizer: Tokenizer, app: Application, prompts: int, corrections: int) -> None:
    """One line for each way of choosing."""
    shelf = shelved(engine, tokenizer, list(islice(stream(app, "train", 3), corrections)))
    asked = list(islice(stream(app, "held_out", 5), prompts))
    dice = random.Random(7)
    began = time.perf_counter()
    vectors = {id(one): vector(engine, tokenizer, one) for one in asked}
    each = (time.perf_counter() - began) / len(asked)

    def near(most: int) -> Choose:
        config = WorkedConfig(most=most, tokens=2048, similarity=-1)
        return lambda one: nearest(shelf, vectors[id(one)], config, tokenizer)

    def anything(_: Example) -> list[Worked]:
        places = dice.sample(range(len(shelf.ids)), 2)
        return [Worked(shelf.ids[at], shelf.shown[at], shelf.completions[at]) for at in places]

    ways: dict[str, Choose] = {
        "none": lambda _: (), "nearest 1": near(1), "nearest 2": near(2), "nearest 4": near(4), "2 at random": anything,
    }  # fmt: skip
    for name, choose in ways.items():
        chats = [tokenizer.encode_chat(placed(list(one.messages), choose(one))) for one in asked]
        sampling = Sampling(temperature=0.0, seed=0, max_tokens=160, stop_token_ids=tokenizer.eos_ids)
        answers = [tokenizer.decode(done.token_ids) for done in engine.generate(chats, sampling)]
        house, base = judged(answers, asked, app.house_ok), judged(answers, asked, app.base_ok)
        tokens = statistics.mean(len(chat) for chat in chats)
        print(f"{app.name:12} {name:18} {house!s:24} {base!s:24} {tokens:.0f}")
    print(f"{app.name:12} a question's vector takes {each * 1000:.1f} ms alone")


def shelved(engine: LocalEngine, tokenizer: Tokenizer, examples: Sequence[Example]) -> Shelf:
    """What the job and the snapshot would make of these corrections."""
    shown = tuple(shown_of(list(one.messages)) or "" for one in examples)
    vectors = np.stack([pooled(engine, read_tokens(tokenizer, text)) for text in shown])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = tuple(UUID(int=place) for place in range(len(examples)))
    return Shelf(Mark(len(ids), 0), "", ids, shown, tuple(one.house for one in examples), unit.astype(np.float32))


def vector(engine: LocalEngine, tokenizer: Tokenizer, example: Example) -> np.ndarray:
    return pooled(engine, read_tokens(tokenizer, question_of(list(example.messages)) or ""))


def pooled(engine: LocalEngine, prompt: list[int]) -> np.ndarray:
    found: np.ndarray = engine.embed([prompt], how="mean")[0].numpy()
    return found


if __name__ == "__main__":
    main()
