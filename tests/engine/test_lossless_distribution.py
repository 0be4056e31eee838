"""What comes out is distributed as the model says: all 512 answers of three tokens, two drafts in every other step.

The model is a table of logits, so only what verifies is at work: places, the sampler, the match, the choice among two.
One drafter knows the verifier's noise and nearly the model, and drafts what it is sure of; two always say the same.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chi2

from engine.layers.sampler import Draw, Sampled, gumbel, row_keys
from engine.messages import Generate, Sampling
from engine.runner.sampling import Place, draw_at
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence
from engine.speculation.acceptance import Counts
from engine.speculation.drafting import Drafting
from engine.speculation.tries import Try, state_of
from engine.speculation.verify import verify

VOCABULARY, LENGTH, SAMPLES, CHUNK = 8, 3, 200_000, 4_000
TEMPERATURE = 0.8
CELLS = VOCABULARY**LENGTH
COUNTS, BRANCH = Counts(1), np.zeros(1, dtype=np.int64)
# Answers of three tokens follow the contexts: 1 + 8 + 64 lines.
FIRST_ANSWER = 1 + VOCABULARY + VOCABULARY**2
Array = NDArray[Any]


def line_of(tokens: list[int]) -> int:
    """The line of the table for what stands before: 1, then 8, then 64 lines."""
    line = 0
    for token in tokens:
        line = line * VOCABULARY + token + 1
    return line


def table(seed: int) -> Array:
    """Logits for every context."""
    lines = 1 + VOCABULARY + VOCABULARY**2
    return np.random.default_rng(seed).normal(scale=0.9, size=(lines, VOCABULARY)).astype(np.float32)


MODEL = table(0)
CLEVER, LIKELY, UNLIKELY = MODEL + 0.7 * table(1), MODEL.argmax(-1), MODEL.argmin(-1)
# Which of the three draft for an answer, the second one in a row of its own.
TEAMS = [(0,), (1, 0), (2, 1), (0, 1)]


def expected() -> Array:
    """Probability of every answer, first token first."""
    logits = MODEL.astype(np.float64) / TEMPERATURE
    each = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    one, two, three = each[0], each[1 : 1 + VOCABULARY], each[1 + VOCABULARY :].reshape((VOCABULARY,) * 3)
    return np.asarray(one[:, None, None] * two[:, :, None] * three).reshape(-1)


def noise_of(seeds: range) -> Array:
    """The verifier's noise [samples, positions, tokens]."""
    sampling = [Sampling(seed=seed, max_tokens=LENGTH) for seed in seeds]
    keys = row_keys([Draw(one, 0, 1 + place) for one in sampling for place in range(LENGTH)], torch.device("cpu"))
    noise = gumbel(keys[:, None], torch.arange(VOCABULARY)[None])
    return noise.view(len(seeds), LENGTH, VOCABULARY).numpy()


def clever(lines: Array, lengths: Array, noise: Array, sure: Array) -> list[list[int]]:
    """For answers with these lines and lengths: what would be drawn with their noise, as far as that is sure enough."""
    drafts: list[list[int]] = [[] for _ in lines]
    each, going = np.arange(len(lines)), np.ones(len(lines), dtype=bool)
    for depth in range(LENGTH - 1):
        going &= lengths + depth < LENGTH - 1
        logits = CLEVER[np.where(going, lines, 0)] / TEMPERATURE
        token = (logits + noise[each, np.minimum(lengths + depth, LENGTH - 1)]).argmax(-1)
        going &= np.exp(logits)[each, token] >= sure * np.exp(logits).sum(-1)
        for at in np.flatnonzero(going):
            drafts[at].append(int(token[at]))
        lines = lines * VOCABULARY + token + 1
    return drafts


def stubborn(always: list[int], line: int, length: int) -> list[int]:
    """The same token in the same context, as long as one may be drafted."""
    drafted = []
    for _ in range(length, LENGTH - 1):
        drafted.append(always[line])
        line = line * VOCABULARY + always[line] + 1
    return drafted


def rows_of(sequences: list[Sequence], numbers: Array, noise: Array) -> list[Row]:
    """A row for every sequence, for most a second; what is tried is kept as the engine keeps it."""
    lines = np.array([line_of(each.tokens[1:]) for each in sequences])
    lengths = np.array([len(each.tokens) - 1 for each in sequences])
    known = clever(lines, lengths, noise, np.array([0.0, 0.1, 0.3])[(numbers + lengths) % 3])
    likely, unlikely = LIKELY.tolist(), UNLIKELY.tolist()
    rows = []
    for sequence, number, line, own in zip(sequences, numbers.tolist(), lines.tolist(), known, strict=True):
        size = sequence.computed = len(sequence.tokens) - 1
        team = TEAMS[number % len(TEAMS)]
        drafts = [stubborn((own, likely, unlikely)[who], line, size) if who else own for who in team]
        first, second = drafts[0], drafts[-1]
        state = state_of(sequence)
        state.chosen, state.second = (Try("suffix", tokens, [], [], COUNTS) for tokens in (first, second))
        rows.append(Row(sequence, 1 + len(first), tuple(first)))
        if second[: len(first)] != first:
            rows.append(Row(sequence, 1 + len(second), tuple(second), BRANCH))
    return rows


class Winner(Drafting):
    """Chooses as the engine does; holds no blocks."""

    def __init__(self) -> None: ...

    def _join(self, *_: object) -> None: ...


Mutant = Callable[[Place, Row], Place]


def answers(
    seeds: range, mutant: Mutant = lambda place, _: place, bonus: Callable[[Any, int, Row], None] | None = None
) -> tuple[Array, int]:
    """How often every answer came, and in how many steps."""
    came, steps, choose = np.zeros(CELLS, dtype=np.int64), 0, Winner().choose
    for start in range(seeds.start, seeds.stop, CHUNK):
        own = range(start, min(start + CHUNK, seeds.stop))
        noise, numbers = noise_of(own), np.arange(len(own))
        sampling = [Sampling(temperature=TEMPERATURE, seed=seed, max_tokens=LENGTH) for seed in own]
        sequences = [Sequence(b"", Generate(id="", prompt=[0], sampling=each), 0, 1 + LENGTH) for each in sampling]
        while len(numbers):
            steps += len(numbers)
            rows = rows_of([sequences[number] for number in numbers], numbers, noise[numbers])
            sampled = step(rows, mutant)
            if bonus is not None:
                end = 0
                for row in rows:
                    end += 1 + len(row.drafted)
                    bonus(sampled.token_ids, end - 1, row)
            for each in choose(verify(rows, sampled)):
                each.row.sequence.tokens += sampled.token_ids[each.first : each.first + each.accepted + 1]
            numbers = numbers[[len(sequences[number].tokens) <= LENGTH for number in numbers]]
        lines = [line_of(each.tokens[1:]) for each in sequences]
        came += np.bincount(np.array(lines) - FIRST_ANSWER, minlength=CELLS)
    return came, steps


def step(rows: list[Row], mutant: Mutant) -> Sampled:
    """What the table's model answers behind every row's own tokens and each drafted one."""
    places, lines = [], []
    for row in rows:
        line = line_of(row.sequence.tokens[1:])
        places.append(mutant(Place(row.sequence), row))
        lines.append(line)
        for size, token in enumerate(row.drafted, start=1):
            places.append(mutant(Place(row.sequence, row.drafted[:size]), row))
            lines.append(line := line * VOCABULARY + token + 1)
    return draw_at(places, torch.from_numpy(MODEL[lines]))


def chi_square(came: Array) -> float:
    """p of what came; cells that are expected too seldom are taken together."""
    total = expected() * came.sum()
    rare = total < 5
    found, wanted = (np.append(each[~rare], each[rare].sum()) for each in (came, total))
    statistic = ((found - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
    return float(chi2.sf(statistic, len(found) - 1))


@pytest.fixture(autouse=True)
def no_collections() -> Iterator[None]:
    """Half of the time here would go to looking for cycles among many small objects."""
    gc.disable()
    yield
    gc.enable()


def distance(came: Array) -> Array:
    """Total variation from the model, of one count of all answers or of many."""
    return np.asarray(0.5 * np.abs(came / came.sum(-1, keepdims=True) - expected()).sum(-1))


def test_two_hundred_thousand_answers_are_distributed_as_the_model_says() -> None:
    came, steps = answers(range(SAMPLES))
    assert came.sum() == SAMPLES
    assert steps < 2.2 * SAMPLES, "drafts were hardly ever accepted"
    assert chi_square(came) > 1e-4
    floor = distance(np.random.default_rng(0).multinomial(SAMPLES, expected(), size=400))
    assert distance(came) <= floor.mean() + 4 * floor.std()


class Independent(Place):
    """A place whose noise is another choice's."""

    @property
    def draw(self) -> Draw:
        return super().draw._replace(choice=9)


def coldly(tokens: list[int], place: int, row: Row) -> None:
    """The token behind a whole draft is the likeliest one."""
    if row.drafted:
        tokens[place] = int(MODEL[line_of([*row.sequence.tokens[1:], *row.drafted])].argmax())


def on_trust(tokens: list[int], place: int, row: Row) -> None:
    """The first drafted token is not verified."""
    if row.drafted:
        tokens[place - len(row.drafted)] = row.drafted[0]


@pytest.mark.parametrize("mutant", ["independent noise", "cold bonus", "first unverified"])
def test_the_distribution_of_every_mutant_is_found_wrong(mutant: str) -> None:
    some = range(SAMPLES, SAMPLES + 16_000)
    if mutant == "independent noise":
        came, _ = answers(some, lambda place, row: place if row.branch is None else Independent(*place))
    else:
        came, _ = answers(some, bonus=coldly if mutant == "cold bonus" else on_trust)
    assert chi_square(came) < 1e-6
