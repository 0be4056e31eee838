"""The states behind logged answers: what speculator heads are trained on. Teacher-forced, batched, prompts cached.

Suffixes: N tokens of one answer, E hidden size.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import NamedTuple

import torch

from engine.core import Engine
from engine.messages import Generate, Sampling
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence

CLIENT = b"states"
# Waiting beside those that run: enough for the scheduler to fill its steps, few enough to bound memory.
QUEUED = 16


class Answered(NamedTuple):
    """A prompt and its answer, as token ids. Both hold one token at least."""

    prompt: list[int]
    answer: list[int]


class States(NamedTuple):
    """`hidden_NE[n]` is the LM head's input that produced token n of answer number `number`; on the CPU, fp32."""

    number: int
    hidden_NE: torch.Tensor


class _Pending:
    """One answer on its way through the engine."""

    def __init__(self, index: int, row: Answered, sequence: Sequence) -> None:
        self.index, self.row, self.sequence = index, row, sequence
        self.first = len(row.prompt) - 1
        self.parts: list[torch.Tensor] = []


def answer_states(core: Engine, rows: Iterable[Answered], adapter: str | None = None) -> Iterator[States]:
    """States of each row's answer under the base and `adapter` (loaded), in the order in which they are finished.

    Nothing else may run on this engine. Rows are taken as they are needed, so memory holds few of them. Raises
    ValueError for a row that is empty, too long or not of this vocabulary.
    """
    assert not core.busy, "states are computed between generations"
    slot = core.adapters.slots.acquire(adapter) if adapter is not None else 0
    pending: dict[Sequence, _Pending] = {}
    try:
        yield from _run(core, enumerate(rows), adapter, slot, pending)
    finally:
        for sequence in pending:
            core.scheduler.remove(sequence)
        if adapter is not None:
            core.adapters.slots.release(adapter)


def _run(
    core: Engine,
    rows: Iterator[tuple[int, Answered]],
    adapter: str | None,
    slot: int,
    pending: dict[Sequence, _Pending],
) -> Iterator[States]:
    arrivals = count()

    def enter(index: int, row: Answered, *, reuse: bool) -> None:
        sequence = _sequence(core, row, adapter, slot, next(arrivals), reuse=reuse)
        pending[sequence] = _Pending(index, row, sequence)
        core.scheduler.add(sequence)

    while True:
        for index, row in islice(rows, core.config.max_running + QUEUED - len(pending)):
            enter(index, row, reuse=True)
        if not pending:
            return
        for done in _step(core, pending):
            del pending[done.sequence]
            core.scheduler.remove(done.sequence)
            if done.sequence.cached_tokens > done.first:  # part of the answer lay in the cache: its states did not
                enter(done.index, done.row, reuse=False)
            else:
                yield States(done.index, torch.cat(done.parts))


def _sequence(core: Engine, row: Answered, adapter: str | None, slot: int, number: int, *, reuse: bool) -> Sequence:
    # The answer's last token produces nothing.
    tokens = [*row.prompt, *row.answer[:-1]]
    if not row.prompt or not row.answer or len(tokens) > core.max_context:
        raise ValueError(f"a prompt and an answer of 1 to {core.max_context} tokens together")
    if not 0 <= min(tokens) <= max(tokens) < core.forward.spec.vocab_size:
        raise ValueError(f"token ids must lie between 0 and {core.forward.spec.vocab_size - 1}")
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=1)
    request = Generate(id=f"states-{number}", prompt=tokens, sampling=sampling, adapter=adapter)
    sequence = Sequence(CLIENT, request, arrival=number, limit=core.max_context)
    sequence.slot, sequence.reuses = slot, reuse
    return sequence


@torch.inference_mode()
def _step(core: Engine, pending: dict[Sequence, _Pending]) -> list[_Pending]:
    """Compute one batch; those that it finished."""
    rows = sorted(core.scheduler.schedule(), key=_order)
    if core.scheduler.fresh:
        core.forward.clear(core.scheduler.fresh)
        core.scheduler.fresh = []
    take: list[int] = []
    offset, shares = 0, []
    for sequence, length, *_ in rows:
        skipped = min(length, max(0, pending[sequence].first - sequence.computed))
        take += range(offset + skipped, offset + length)
        shares.append(length - skipped)
        offset += length
    hidden = core.forward.run(rows, take, logits=False).hidden_RE.float().cpu()
    for row, part in zip(rows, torch.split(hidden, shares), strict=True):
        if len(part):
            pending[row.sequence].parts.append(part.clone())
    core.scheduler.advance(rows)
    return [pending[row.sequence] for row in rows if row.sequence.computed == len(row.sequence.tokens)]


def _order(row: Row) -> tuple[int, int]:
    return row.length, row.sequence.computed
