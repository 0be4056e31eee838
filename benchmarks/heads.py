"""Which heads to train: what the token before does to a head, what a head starts from, how many, how many words.

    python -m benchmarks.heads [--requests 1000] [--held-out 150] [--answers DIR] [--out benchmarks/results/heads.md]

The starter model answers prompts of its three applications, half greedily and half at temperature 0.7 (kept in DIR
between runs). Every kind of heads is trained on the same states in the same order, and judged on prompts with facts
that no training prompt had: tau is the mean number of tokens a step yields, one and the drafts before the first wrong
one, over all places of all answers, under the verifier's own noise where the temperature is not 0.

What counts is acceptance for its price: `speed` is what tau is worth to one stream, tau x step(1) / (step(1 + K) + K x
head). Steps are the engine's own measurements at start; a head is timed by the engine's own drafter for one row. It has
no Markov bias, so that is charged for its bytes: a token's row of rank 256 and the product with all words.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Tokenizer
from torch import nn

from benchmarks.figures import STARTER
from engine.messages import Generate, Sampling
from engine.offline import LocalEngine
from engine.states import Answered, answer_states
from examples.grammars.common import Application, Split, stream
from examples.grammars.simulate import APPLICATIONS
from examples.starter_data import render_prompt, token_id
from examples.starter_tokenizer import TURN_END
from worker.training.head_data import effective_head, frequent, places_of
from worker.training.head_files import as_speculator
from worker.training.head_loop import Loop, Material, Pace, per_request
from worker.training.head_model import Heads
from worker.training.head_timing import drafting_ms
from worker.training.spec import Request

RANK = 256
LONGEST = 200
# Temperatures, each with a seed for its prompts.
TEMPERATURES = {0.0: 3, 0.7: 7}
PACE = Pace(lr=1e-2, epochs=3.0, batch_tokens=512, seed=0)
# Held-out answers that tell the training when to stop; the others are judged.
STOP = 3


class Markov(Heads):
    """The previous token adds a rank-256 bias to the logits instead."""

    def __init__(self, head_VE: torch.Tensor, heads: int, *, recurrent: bool) -> None:
        super().__init__(head_VE, heads, conditioning="none", recurrent=recurrent)
        words = len(head_VE)
        self.before = nn.Parameter(0.02 * torch.randn(heads, words + 1, RANK))
        self.after = nn.Parameter(torch.zeros(heads, RANK, words))

    def drafting(self) -> list[nn.Parameter]:
        return [*super().drafting(), self.before, self.after]

    def logits(self, head: int, state_NE: torch.Tensor, previous_N: torch.Tensor) -> torch.Tensor:
        return super().logits(head, state_NE, previous_N) + self.before[head][previous_N] @ self.after[head]


class Mapped(Heads):
    """The previous token's output embedding goes through a matrix of the head's: Hydra's MLP. Baked into a table for
    drafting, so it costs what a table costs; a word that is rare in training still has its embedding."""

    def __init__(self, head_VE: torch.Tensor, heads: int, *, recurrent: bool) -> None:
        super().__init__(head_VE, heads, conditioning="none", recurrent=recurrent)
        hidden = head_VE.shape[1]
        self.map = nn.Parameter(torch.zeros(heads, hidden, hidden))
        self.outside = nn.Parameter(torch.zeros(heads, hidden))

    def drafting(self) -> list[nn.Parameter]:
        return [*super().drafting(), self.map, self.outside]

    def step(self, head: int, state_NE: torch.Tensor, previous_N: torch.Tensor) -> torch.Tensor:
        table = torch.cat([self.head_VE @ self.map[head].T, self.outside[head, None]])
        inner_NE = torch.nn.functional.linear(state_NE, self.weight[head], self.bias[head])
        return state_NE + torch.nn.functional.silu(inner_NE + torch.nn.functional.embedding(previous_N, table))


class Kind(NamedTuple):
    """A kind of heads; `tau` in the results is by application."""

    name: str
    make: Callable[[torch.Tensor, int], Heads]


def plain(conditioning: str, *, recurrent: bool) -> Callable[[torch.Tensor, int], Heads]:
    return lambda head_VE, heads: Heads(head_VE, heads, conditioning=conditioning, recurrent=recurrent)


KINDS = (
    Kind("Medusa: nothing", plain("none", recurrent=False)),
    Kind("Markov: bias on the logits", lambda head_VE, heads: Markov(head_VE, heads, recurrent=False)),
    Kind("Hydra: table inside SiLU", plain("hydra", recurrent=False)),
    Kind("Hydra: mapped embedding inside SiLU", lambda head_VE, heads: Mapped(head_VE, heads, recurrent=False)),
    Kind("Hydra, from the head before", plain("hydra", recurrent=True)),
    Kind("Mapped, from the head before", lambda head_VE, heads: Mapped(head_VE, heads, recurrent=True)),
)
WINNER = KINDS[2]
# The starter knows 2,160 words: the last is all of them.
SIZES = ((4, 512), (4, 1024), (4, 2160), (8, 512), (8, 1024))


class World(NamedTuple):
    """One application's requests with their states: those to train on first, then the held-out ones."""

    name: str
    requests: list[Request]
    states: list[torch.Tensor]
    held_out: int


class Engine(NamedTuple):
    """What comes from the engine: LM head [vocabulary, E] and milliseconds of a step by its tokens."""

    engine: LocalEngine
    head: torch.Tensor
    step_ms: dict[int, float]


def main() -> None:
    """Measure everything and write the table; progress goes to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="of each application, to train on")
    parser.add_argument("--held-out", type=int, default=150, help="of each application, to judge by")
    parser.add_argument("--answers", type=Path, help="keep and take the starter's answers here")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/heads.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with LocalEngine(STARTER, precision="fp32", threads=1, kv_tokens=65536) as engine:
        worlds = [collect(engine, app, options) for app in APPLICATIONS.values()]
        known = from_engine(engine)
        kinds = [measure(kind, worlds, known, 4, 512) for kind in KINDS]
        sizes = [
            measure(WINNER._replace(name=f"{heads} heads, {words} words"), worlds, known, heads, words)
            for heads, words in SIZES
        ]
    options.out.write_text(report(worlds, kinds, sizes, known), encoding="utf-8")


def collect(engine: LocalEngine, app: Application, options: argparse.Namespace) -> World:
    """Answers, greedy and sampled in turn, and their states."""
    parts = [answers(engine, app, "train", options.requests, options.answers)]
    parts.append(answers(engine, app, "held_out", options.held_out, options.answers))
    requests = [request for part in parts for request in part]
    rows = (Answered(request.prompt, request.answer) for request in requests)
    began = time.perf_counter()
    states = {row.number: row.hidden_NE for row in answer_states(engine.core, rows)}
    tokens = sum(len(request.prompt) + len(request.answer) for request in requests)
    print(
        f"{app.name}: states behind {tokens} tokens, {tokens / (time.perf_counter() - began):.0f} tokens/s", flush=True
    )
    return World(app.name, requests, [states[i] for i in range(len(requests))], len(parts[1]))


def answers(engine: LocalEngine, app: Application, split: Split, count: int, kept: Path | None) -> list[Request]:
    """What the starter says to `count` prompts, its temperatures taking turns."""
    by_heat = [_said(engine, app, split, count // 2, heat, kept) for heat in TEMPERATURES]
    return [request for turn in zip(*by_heat, strict=True) for request in turn]


def _said(
    engine: LocalEngine, app: Application, split: Split, count: int, heat: float, kept: Path | None
) -> list[Request]:
    file = kept / f"{app.name}-{split}-{heat}.jsonl" if kept else None
    if file is not None and file.exists():
        known = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
        if len(known) == count:
            return [Request(row["prompt"], row["response"], row["temperature"], row["seed"]) for row in known]
    tokenizer = Tokenizer.from_file(str(STARTER / "tokenizer.json"))
    stop = token_id(tokenizer, TURN_END)
    examples = islice(stream(app, split, TEMPERATURES[heat]), count)
    prompts = [tokenizer.encode(render_prompt(example.messages)).ids for example in examples]
    asked = [
        Generate(
            id=str(number), prompt=prompt, speculate=False,
            sampling=Sampling(temperature=heat, seed=1000 + number, max_tokens=LONGEST, stop_token_ids=(stop,)),
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    done = engine.generate(asked)
    made = [Request(each.prompt, answer.token_ids, heat, each.sampling.seed)
            for each, answer in zip(asked, done, strict=True)]  # fmt: skip
    if file is not None:
        lines = ({"prompt": r.prompt, "response": r.answer, "temperature": heat, "seed": r.seed} for r in made)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return made


def from_engine(engine: LocalEngine) -> Engine:
    """The LM head, and the engine's own table of step times: one row, little context."""
    forward = engine.core.forward
    head = effective_head(lambda x: forward.logits(x, [0] * len(x)), forward.spec.hidden_size).clone()
    costs = [cost for cost in engine.core.status("costs").costs if cost.rows == 1]
    shortest = min(cost.context for cost in costs)
    return Engine(engine, head, {cost.tokens: cost.milliseconds for cost in costs if cost.context == shortest})


class Result(NamedTuple):
    """One kind or size: tau (greedy, shared) and speed (both) by application, and what it cost."""

    name: str
    heads: int
    tau: dict[str, tuple[float, float]]
    speed: dict[str, float]
    head_ms: float
    seconds: float


def measure(kind: Kind, worlds: Sequence[World], known: Engine, heads: int, words: int) -> Result:
    """Train and judge one kind on every application."""
    tau, speed, spent, drafting = {}, {}, 0.0, 0.0
    for world in worlds:
        began = time.process_time()
        made, tokens_V, taus = trained(kind, world, known.head, heads, words)
        spent += time.process_time() - began
        drafting = head_ms(known.engine, made, tokens_V)
        tau[world.name] = taus
        step = known.step_ms[1] / (step_ms(known, 1 + heads) + heads * drafting)
        speed[world.name] = sum(taus) / len(taus) * step
        print(f"{kind.name}: {world.name} tau {taus[0]:.3f} {taus[1]:.3f} speed {speed[world.name]:.2f}", flush=True)
    return Result(kind.name, heads, tau, speed, drafting, spent)


def trained(
    kind: Kind, world: World, head: torch.Tensor, heads: int, words: int
) -> tuple[Heads, torch.Tensor, tuple[float, float]]:
    """The trained heads, their words, and tau on the greedy and on the sampled held-out answers."""
    torch.manual_seed(PACE.seed)
    first = len(world.requests) - world.held_out
    tokens_V = frequent((request.answer for request in world.requests[:first]), words, len(head))
    material = Material(world.requests, world.states, tokens_V, places_of(tokens_V, len(head)))
    made = kind.make(head[tokens_V], heads)
    stop = range(first, len(world.requests), STOP)
    Loop(made, material, range(first), stop, PACE, None).run(lambda *_: None)
    judged = [index for index in range(first, len(world.requests)) if index not in stop]

    def tau(heat: float) -> float:
        shares = per_request(made, material, [i for i in judged if world.requests[i].temperature == heat])
        return 1 + sum(map(sum, shares)) / len(shares)

    greedy, sampled = map(tau, TEMPERATURES)
    return made, tokens_V, (greedy, sampled)


def head_ms(engine: LocalEngine, heads: Heads, tokens_V: torch.Tensor) -> float:
    """Milliseconds of one head for one row. A mapped embedding is a table by the time it drafts."""
    speculator = as_speculator(heads, tokens_V)
    words, hidden = heads.head_VE.shape
    if isinstance(heads, Mapped):
        speculator = replace(speculator, condition_CVE=torch.zeros(heads.count, words + 1, hidden))
    plain = drafting_ms(engine.core.forward, speculator)["1"]
    if not isinstance(heads, Markov):
        return plain
    return plain * (1 + RANK * (words + 1) / (hidden * (hidden + words)))


def step_ms(known: Engine, tokens: int) -> float:
    """Milliseconds of a step of so many tokens: that of the next larger size measured."""
    return known.step_ms[min(size for size in known.step_ms if size >= tokens)]


def report(worlds: Sequence[World], kinds: Sequence[Result], sizes: Sequence[Result], known: Engine) -> str:
    """The page."""
    names = [world.name for world in worlds]
    told = ", ".join(
        f"{world.name} {len(world.requests) - world.held_out} requests with "
        f"{sum(len(r.answer) for r in world.requests[: -world.held_out])} answer tokens" for world in worlds
    )  # fmt: skip
    steps = ", ".join(f"{size}: {known.step_ms[size]:.2f}" for size in sorted(known.step_ms) if size <= 16)
    return f"""# Which heads

`python -m benchmarks.heads` on the starter model, fp32, one thread. Trained on {told}; judged on {worlds[0].held_out}
held-out requests each, of which every third only told when to stop. Tau: greedy / temperature 0.7 with shared noise.
Speed: what tau is worth to one stream by the times of this run (a head's in the table, steps in ms by tokens: {steps}).

## What the token before does, with 4 heads and 512 words

{_table(kinds, names)}

## How many heads and words, with a table inside SiLU

{_table(sizes, names)}
"""


def _table(results: Sequence[Result], names: Sequence[str]) -> str:
    head = "| | " + " | ".join(f"{name} tau | speed" for name in names) + " | ms a head | s to train |"
    rule = "|---|" + "---|" * (2 * len(names) + 2)
    lines = [head, rule]
    for each in results:
        cells = [f"{each.tau[name][0]:.3f} / {each.tau[name][1]:.3f} | {each.speed[name]:.2f}" for name in names]
        lines.append(f"| {each.name} | " + " | ".join(cells) + f" | {each.head_ms:.3f} | {each.seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
