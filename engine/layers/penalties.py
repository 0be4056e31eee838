"""Edits of a row's logits between the model and the sampler: bias, penalties and stops that come too early.

Suffixes: R rows, V vocabulary, N (row, token) pairs. All functions ending in _ change fp32 logits in place.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.messages import Sampling

Tokens = NDArray[np.int64]


class Marks(NamedTuple):
    """What one row's penalties need: the tokens that were seen, and how often each stands in the answer."""

    sampling: Sampling
    tokens_N: Tokens
    counts_N: Tokens


class Counts:
    """How often each token stands in an answer, kept token by token; prompt tokens are known, but count nothing.

    `push` and `pop` are inverse, so a draft can be counted, looked at and taken back.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        known = list(dict.fromkeys(prompt))
        self.answer: list[int] = []
        self._prompt_size = len(known)
        self._places = {token: place for place, token in enumerate(known)}
        self._tokens = np.array(known, dtype=np.int64)
        self._counts = np.zeros(len(known), dtype=np.int64)

    def push(self, token: int) -> None:
        """Count one more token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        if place >= len(self._tokens):
            self._tokens, self._counts = _doubled(self._tokens), _doubled(self._counts)
        self._tokens[place] = token
        self._counts[place] += 1
        self.answer.append(token)

    def pop(self) -> None:
        """Take the last token back."""
        self._counts[self._places[self.answer.pop()]] -= 1

    def marks(self, sampling: Sampling, drafted: Sequence[int] = ()) -> Marks:
        """What the penalties see after `drafted` more tokens, which are not kept. The arrays are the caller's."""
        for token in drafted:
            self.push(token)
        size = len(self._places)
        seen = self._counts[:size] > 0
        seen[: self._prompt_size] = True
        marks = Marks(sampling, self._tokens[:size][seen], self._counts[:size][seen])
        for _ in drafted:
            self.pop()
        return marks


class Edits:
    """What a sequence keeps so that each step edits its logits without reading its whole history again."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.counts = Counts(prompt if sampling.repetition_penalty != 1 else ()) if penalised(sampling) else None
        self._start = len(prompt)
        self.biased_N = np.fromiter(sampling.logit_bias, dtype=np.int64)
        self.bias_N = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)

    def follow(self, tokens: Sequence[int]) -> None:
        """Count what prompt and answer hold beyond what was counted: the whole answer when this state is fresh."""
        if self.counts is not None:
            for token in tokens[self._start + len(self.counts.answer) :]:
                self.counts.push(token)

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens that were followed."""
        if self.counts is not None:
            for _ in range(count):
                self.counts.pop()


def penalised(sampling: Sampling) -> bool:
    """Whether any of the three penalties acts."""
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)


def penalise_(logits_RV: torch.Tensor, marked: Sequence[tuple[int, Marks]]) -> None:
    """Penalties of (row, marks) pairs: repetition first, which scales towards less likely, then what is subtracted."""
    rows = [marks for _, marks in marked]
    sizes = [len(marks.tokens_N) for marks in rows]
    flat_N = _flat(logits_RV, [(row, marks.tokens_N) for row, marks in marked])
    counts_N = torch.from_numpy(np.concatenate([marks.counts_N for marks in rows])).to(logits_RV.device)
    repetition_N, presence_N, frequency_N = _spread(rows, sizes, logits_RV.device)
    values_N = logits_RV.view(-1).index_select(0, flat_N)
    values_N = torch.where(values_N > 0, values_N / repetition_N, values_N * repetition_N)
    values_N -= frequency_N * counts_N + presence_N * (counts_N > 0)
    logits_RV.view(-1).index_copy_(0, flat_N, values_N)


def bias_(logits_RV: torch.Tensor, edited: Sequence[tuple[int, Edits]]) -> None:
    """Add each row's bias to the tokens it names."""
    flat_N = _flat(logits_RV, [(row, edits.biased_N) for row, edits in edited])
    bias_N = torch.from_numpy(np.concatenate([edits.bias_N for _, edits in edited])).to(logits_RV.device)
    logits_RV.view(-1).index_add_(0, flat_N, bias_N)


def forbid_(logits_RV: torch.Tensor, forbidden: Sequence[tuple[int, Collection[int]]]) -> None:
    """Make the tokens named for each row impossible; names beyond the vocabulary mean nothing."""
    known = range(logits_RV.shape[1])
    named = [
        (row, np.array([token for token in tokens if token in known], dtype=np.int64)) for row, tokens in forbidden
    ]
    flat_N = _flat(logits_RV, named)
    logits_RV.view(-1).index_fill_(0, flat_N, float("-inf"))


def _spread(rows: Sequence[Marks], sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Each row's three penalties, once for every token it marks: [3, N]."""
    penalties = [
        (marks.sampling.repetition_penalty, marks.sampling.presence_penalty, marks.sampling.frequency_penalty)
        for marks in rows
    ]
    return torch.from_numpy(np.repeat(np.array(penalties, dtype=np.float32).T, sizes, axis=1)).to(device)


def _flat(logits_RV: torch.Tensor, pairs: Sequence[tuple[int, Tokens]]) -> torch.Tensor:
    """Places in the flattened logits; torch's two-dimensional fancy indexing is ten times slower."""
    vocabulary = logits_RV.shape[1]
    return torch.from_numpy(np.concatenate([row * vocabulary + tokens for row, tokens in pairs])).to(logits_RV.device)


def _doubled(values: Tokens) -> Tokens:
    return np.concatenate([values, np.zeros(max(64, len(values)), dtype=values.dtype)])
