"""One step: rows in, one forward over the flattened tokens, one sampler, everything asked for out.

Suffixes: R tokens whose result is wanted, E hidden size, V vocabulary.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine.layers.sampler import Sampled, most_likely, own_logprobs
from engine.layers.sampler import sample as plain_sample
from engine.native.sampling import sample
from engine.runner.forward import Forward
from engine.runner.sampling import draw
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence

# Prompt logits computed at once: a vocabulary of 128 k makes 64 of them 32 MB.
PROMPT_LOGITS = 64
NOTHING = Sampled([], [])


class PromptChunk(NamedTuple):
    """Log-probabilities of consecutive prompt tokens, each given those before it, and the likeliest at each place."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


@dataclass
class StepOutput:
    """Rows in the order they were computed, the sampled tokens of those that sample, and the head's input for them.

    A row that samples has one place behind its sequence's last token and one behind each drafted token, in order: so
    many entries of `sampled` and of `hidden_RE` are its own. `pooled` holds the head's input [tokens, E] of this step's
    rows that were asked for a vector; `prompt` what rows that want their prompt scored learnt in this step. Tensors are
    valid until the next step.
    """

    rows: list[Row]
    sampled: Sampled
    hidden_RE: torch.Tensor
    pooled: dict[Sequence, torch.Tensor] = field(default_factory=dict)
    prompt: dict[Sequence, PromptChunk] = field(default_factory=dict)


class Runner:
    """Runs scheduled rows on the model. Knows neither requests' lives nor the pool."""

    def __init__(self, forward: Forward, *, native: bool = True) -> None:
        self.forward = forward
        self._sample = sample if native else plain_sample

    @torch.inference_mode()
    def step(self, rows: Rows[Row]) -> StepOutput:
        """Compute every row's tokens and draw the next token of those that reach their end."""
        ordered = sorted(rows, key=_order)
        if any(_wants_all(row.sequence) for row in ordered):
            return self._step_with_states(ordered)
        take: list[int] = []
        drawn: list[Row] = []
        end = 0
        for row in ordered:
            end += row.length
            if row.samples:
                take.extend(range(end - 1 - len(row.drafted), end))
                drawn.append(row)
        heads = self.forward.run(ordered, take, logits=bool(drawn))
        return StepOutput(ordered, draw(drawn, heads.logits_RV, self._sample) if drawn else NOTHING, heads.hidden_RE)

    @torch.inference_mode()
    def hidden(self, rows: Rows[Row]) -> torch.Tensor:
        """Head input [T, E] for every token of rows sorted by slot, in their order; a fresh tensor."""
        return self.forward.run(rows, range(sum(row.length for row in rows)), logits=False).hidden_RE.clone()

    def _step_with_states(self, ordered: list[Row]) -> StepOutput:
        """The same for steps in which some row wants more than its last token: states first, logits afterwards."""
        hidden_TE = self.hidden(ordered)
        output = StepOutput(ordered, NOTHING, hidden_TE)
        ends: list[int] = []
        drawn: list[Row] = []
        offset = 0
        for row in ordered:
            states = hidden_TE[offset : offset + row.length]
            offset += row.length
            if row.sequence.pool is not None:
                output.pooled[row.sequence] = states
                continue
            if row.sequence.request.prompt_logprobs and not row.sequence.produced:
                output.prompt[row.sequence] = self._score(row, states)
            if row.samples:
                ends.extend(range(offset - 1 - len(row.drafted), offset))
                drawn.append(row)
        output.hidden_RE = hidden_TE[ends]
        if drawn:
            slots = [row.sequence.slot for row in drawn for _ in range(1 + len(row.drafted))]
            output.sampled = draw(drawn, self.forward.logits(output.hidden_RE, slots), self._sample)
        return output

    def _score(self, row: Row, states: torch.Tensor) -> PromptChunk:
        """What the model thought of the prompt tokens behind those of this row."""
        sequence, start = row.sequence, row.sequence.computed
        following = sequence.tokens[start + 1 : start + row.length + 1]
        chunk = PromptChunk([], [])
        for at in range(0, len(following), PROMPT_LOGITS):
            tokens = following[at : at + PROMPT_LOGITS]
            logits_RV = self.forward.logits(states[at : at + len(tokens)], [sequence.slot] * len(tokens))
            chunk.logprobs.extend(own_logprobs(logits_RV, tokens))
            wanted = sequence.request.sampling.top_logprobs
            chunk.top.extend(most_likely(logits_RV, [wanted] * len(tokens)) if wanted else [])
        return chunk


def _order(row: Row) -> tuple[int, int, int]:
    """Equal adapters together, then equal lengths: both make larger products."""
    return row.sequence.slot, row.length, row.sequence.computed


def _wants_all(sequence: Sequence) -> bool:
    return sequence.pool is not None or (sequence.request.prompt_logprobs and not sequence.produced)
