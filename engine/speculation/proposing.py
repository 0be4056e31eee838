"""Asks the drafters, turns what they claim into probabilities, and learns how often they were right.

Every proposal is scored on the tokens that its step reveals, verified or not: the choice between drafters learns from
all of them.
"""

import time
from collections.abc import Sequence as Many

import torch

from engine.scheduling.scheduler import Row
from engine.sequence import Sequence
from engine.speculation.acceptance import HEADS_CELLS, SUFFIX_CELLS, Acceptance, heads_cells, suffix_cells
from engine.speculation.corpora import Corpora, Memory, propose
from engine.speculation.heads import Ask
from engine.speculation.manager import Speculators
from engine.speculation.tries import Try, most_drafted, next_draw, state_of
from engine.speculation.verify import Verified

# Drafts that survive with less than this are not worth their arithmetic.
FAINT = 0.02
# Both drafters are asked for a row every so many steps, so that the one that is not chosen stays known.
COMPARE_STEPS = 16
# What heads add is told apart by what the suffix drafter promises: where it is at a loss, they often are, too.
PROMISES = (0.5, 1.5, 3.0)
SMOOTH = 0.05
# Heads come and go, and must not leave a trace for ever.
MOST_GAINS = 1024


class Proposing:
    """Both drafters of one engine, and what their claims have been worth."""

    def __init__(self, corpora: Corpora, speculators: Speculators) -> None:
        self.corpora, self.speculators = corpora, speculators
        self._suffix, self._heads = Acceptance(SUFFIX_CELLS), Acceptance(HEADS_CELLS)
        # The head's input that drew each sequence's last token, as of the last step.
        self._hidden_RE = torch.empty(0, 0)
        self._places: dict[Sequence, int] = {}
        self._calls = 0
        # What some heads have added to so good a proposal of the suffix drafter, and what asking them costs.
        self._gains: dict[tuple[str, int], float] = {}
        self._ask_seconds = 0.0

    def ask(self, rows: Many[Row], seconds_per_token: float, *, eager: bool = False) -> list[list[Try]]:
        """Proposals row by row, also kept on the sequences to be scored. `eager` asks heads that seem not worth it."""
        self._calls += 1
        tries = []
        for row, one in zip(rows, self._from_suffix(rows), strict=True):
            each = state_of(row.sequence).tries = [] if one is None else [one]
            tries.append(each)
        if self._places:
            curious = eager or self._calls % COMPARE_STEPS == 0
            self._from_heads(rows, tries, float("inf") if curious else seconds_per_token)
        return tries

    def score(self, tries: Many[Try], emitted: Many[int]) -> None:
        """Learn which drafted tokens came; what stands behind a wrong one was not tried."""
        came = {one.drafter: self._matched(one, emitted) for one in tries}
        heads = tries[-1] if tries and tries[-1].drafter == "heads" else None
        if heads is not None:
            key = self.speculators.digest(heads.slot), _promised(tries[:-1])
            # What asking them was worth: the draft that promised most against the one there would have been anyhow.
            gain = came[max(tries, key=lambda one: one.expected).drafter] - came.get("suffix", 0)
            self._gains[key] = (1 - SMOOTH) * self._gains.get(key, gain) + SMOOTH * gain
            if len(self._gains) > MOST_GAINS:
                del self._gains[next(iter(self._gains))]

    def _matched(self, one: Try, emitted: Many[int]) -> int:
        """Count a proposal's tokens as tried, up to the first that did not come; how many came."""
        acceptance = self._suffix if one.drafter == "suffix" else self._heads
        matched = 0
        for token, cell, said in zip(one.tokens, one.cells, emitted, strict=False):
            acceptance.learn(one.counts, cell, token == said)
            if token != said:
                break
            matched += 1
        return matched

    def remember(self, verified: Many[Verified], hidden_RE: torch.Tensor) -> None:
        """Where the head's input stands that drew each sequence's last token; it stays until the next forward."""
        self._hidden_RE = hidden_RE
        self._places = {
            each.row.sequence: each.first + each.accepted
            for each in verified
            if not each.row.sequence.ended and each.row.sequence.request.speculator
        }

    def drop(self, sequence: Sequence) -> None:
        """Its request is over."""
        self._places.pop(sequence, None)

    def forget(self, namespace: str) -> None:
        """Drop what was learnt of a namespace."""
        self.corpora.forget(namespace)
        self._suffix.forget(namespace)
        self._heads.forget(namespace)

    def _from_suffix(self, rows: Many[Row]) -> list[Try | None]:
        memories, draws, most = [], [], []
        for row in rows:
            sequence = row.sequence
            memories.append(self._memory(sequence))
            draws.append(next_draw(sequence) if sequence.request.sampling.temperature > 0 else None)
            most.append(most_drafted(sequence))
        tries: list[Try | None] = []
        for row, proposal in zip(rows, propose(memories, draws, most), strict=True):
            if not proposal.tokens:
                tries.append(None)
                continue
            own = self._suffix.project(row.sequence.request.namespace)
            cells = suffix_cells(proposal.match, proposal.shares)
            survival = self._suffix.survival(own, cells, proposal.shares)
            tries.append(Try("suffix", proposal.tokens, cells, survival, own))
        return tries

    def _memory(self, sequence: Sequence) -> Memory:
        """The sequence's own index, with all tokens it has now."""
        state = state_of(sequence)
        if state.memory is None:
            state.memory = self.corpora.open(sequence.request.namespace, sequence.request.prompt)
            state.fed = len(sequence.request.prompt)
        if state.fed < len(sequence.tokens):
            state.memory.extend(sequence.tokens[state.fed :])
            state.fed = len(sequence.tokens)
        return state.memory

    def _from_heads(self, rows: Many[Row], tries: list[list[Try]], seconds_per_token: float) -> None:
        """Ask the heads of rows for which they are likely to beat the proposal there is, by more than asking costs."""
        asked, asks, places = [], [], []
        for row, each in zip(rows, tries, strict=True):
            sequence, request = row.sequence, row.sequence.request
            place = self._places.get(sequence)
            slot = self.speculators.slot(request.speculator, request.adapter) if place is not None else 0
            if place is None or not slot:
                continue
            gain = self._gains.get((self.speculators.digest(slot), _promised(each)), 1.0)
            if gain * seconds_per_token > self._ask_seconds or seconds_per_token == float("inf"):
                most = min(most_drafted(sequence), self.speculators.heads(slot))
                asked.append((row, each, slot))
                asks.append(Ask(slot, sequence.tokens[-1], next_draw(sequence), most))
                places.append(place)
        if asks:
            began = time.perf_counter()
            guesses = self.speculators.propose(self._hidden_RE[places].float(), asks, FAINT)
            seconds = (time.perf_counter() - began) / len(asks)
            self._ask_seconds += SMOOTH * (seconds - self._ask_seconds)
            for (row, each, slot), guess in zip(asked, guesses, strict=True):
                if guess.tokens:
                    each.append(self._weighed(row, slot, guess.tokens, guess.chances))

    def _weighed(self, row: Row, slot: int, tokens: list[int], chances: list[float]) -> Try:
        digest = self.speculators.digest(slot)
        own = self._heads.project(row.sequence.request.namespace, digest)
        cells = heads_cells(chances)
        return Try("heads", tokens, cells, self._heads.survival(own, cells, chances), own, slot)


def _promised(tries: Many[Try]) -> int:
    """How good the suffix drafter's proposal is, roughly."""
    expected = tries[0].expected if tries else 0.0
    return sum(expected >= edge for edge in PROMISES)
