"""The next token of every row that reached its end, and of every place behind a token it drafted.

Three layers: what is reported comes from the model's own logits; edits (bias, penalties, early stops, grammar) change a
copy of them; `sample` draws from the result. Rows that need no edits pay for none. A row may be asked about a position
behind tokens that are only drafted: everything a sequence keeps can look ahead without being changed.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch

from engine.grammar.matcher import GrammarMatcher, Lookahead, mask_
from engine.layers.penalties import Edits, bias_, forbid_, penalise_, penalised
from engine.layers.sampler import Draw, Fault, Sampled, most_likely, own_logprobs
from engine.native.sampling import sample
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence

Sampler = Callable[[torch.Tensor, Rows[Draw]], Sampled]
NOT_FINITE = Fault("internal", "the model's logits are not finite")


class Place(NamedTuple):
    """The position to draw for: behind a sequence's tokens and behind `drafted` ones that nobody has accepted yet."""

    sequence: Sequence
    drafted: tuple[int, ...] = ()

    @property
    def draw(self) -> Draw:
        """What the sampler must know."""
        request = self.sequence.request
        behind = self.drafted[-1] if self.drafted else None
        return Draw(request.sampling, request.choice, len(self.sequence.tokens) + len(self.drafted), behind)

    @property
    def early(self) -> bool:
        """Whether the answer may not stop here yet."""
        return self.sequence.produced + len(self.drafted) < self.sequence.request.sampling.min_tokens

    @property
    def edited(self) -> bool:
        """Whether anything stands between this row's logits and the sampler."""
        if self.sequence.unedited:
            return self.sequence.grammar is not None
        sampling = self.sequence.request.sampling
        constrained = self.sequence.grammar is not None or self.early
        return constrained or bool(sampling.logit_bias) or penalised(sampling)


def draw(rows: Rows[Row], logits_RV: torch.Tensor, sample: Sampler = sample) -> Sampled:
    """Tokens for each row's places, in the order of the rows: behind its own tokens, then behind each drafted one."""
    places = []
    for row in rows:
        places.append(Place(row.sequence))
        places += [Place(row.sequence, row.drafted[: count + 1]) for count in range(len(row.drafted))]
    return draw_at(places, logits_RV, sample)


def draw_at(places: Rows[Place], logits_RV: torch.Tensor, sample: Sampler = sample) -> Sampled:
    """One token per place, from the logits row of the same index.

    Behind a draft that a grammar does not admit the answer is meaningless, as the draft will not be accepted.
    """
    draws = [place.draw for place in places]
    edited = [index for index, place in enumerate(places) if place.edited]
    if not edited:
        sampled = sample(logits_RV, draws)
        return _report(places, logits_RV, sampled, [None] * len(places))
    edited_RV = logits_RV.to(torch.float32, copy=True)
    faults = _edit_(edited_RV, places, edited)
    sampled = sample(edited_RV, draws)
    logprobs = own_logprobs(logits_RV, sampled.token_ids)
    return _report(places, logits_RV, sampled._replace(logprobs=logprobs), faults)


def accepted(sequence: Sequence, token: int) -> None:
    """Advance what a request keeps beside its tokens; call it once for every token that was accepted, in order."""
    matcher = _matcher(sequence)
    if matcher is not None:
        matcher.accept(token, sequence.stops)


def complete(sequence: Sequence) -> bool:
    """Whether nothing more may follow what was accepted: the request then ends with reason "stop"."""
    matcher = _matcher(sequence)
    return matcher is not None and matcher.complete


def _report(places: Rows[Place], logits_RV: torch.Tensor, sampled: Sampled, faults: list[Fault | None]) -> Sampled:
    """Add what was asked for beside the tokens, and a fault for every row whose logits were not finite."""
    for row, logprob in enumerate(sampled.logprobs):
        if not math.isfinite(logprob) and faults[row] is None:
            faults[row] = NOT_FINITE
    top: list[list[tuple[int, float]]] = [[] for _ in places]
    asking = [row for row, place in enumerate(places) if place.sequence.request.sampling.top_logprobs]
    if asking:
        asked = logits_RV if len(asking) == len(places) else logits_RV[torch.tensor(asking, device=logits_RV.device)]
        counts = [places[row].sequence.request.sampling.top_logprobs for row in asking]
        for row, ranked in zip(asking, most_likely(asked, counts), strict=True):
            top[row] = ranked
    return sampled._replace(top=top, faults=faults)


def _edit_(logits_RV: torch.Tensor, places: Rows[Place], edited: Rows[int]) -> list[Fault | None]:
    """Bias, penalties, early stops, grammar, in this order; a fault where the grammar leaves nothing to draw."""
    kept = [(row, _edits(places[row].sequence)) for row in edited]
    if biased := [(row, edits) for row, edits in kept if len(edits.biased_N)]:
        bias_(logits_RV, biased)
    marked = [
        (row, edits.counts.marks(places[row].sequence.request.sampling, places[row].drafted))
        for row, edits in kept
        if edits.counts is not None
    ]
    if marked:
        penalise_(logits_RV, marked)
    free = [row for row in edited if places[row].early and places[row].sequence.grammar is None]
    if free:
        forbid_(logits_RV, [(row, places[row].sequence.stops) for row in free])
    return _constrain_(logits_RV, places, edited)


def _constrain_(logits_RV: torch.Tensor, places: Rows[Place], edited: Rows[int]) -> list[Fault | None]:
    faults: list[Fault | None] = [None] * len(places)
    looks = [
        Lookahead(row, matcher, places[row].drafted, places[row].sequence.stops, places[row].early)
        for row in edited
        if (matcher := _matcher(places[row].sequence)) is not None
    ]
    problems = mask_(logits_RV, looks)
    for look in looks:
        if look.row in problems:
            faults[look.row] = Fault("internal" if look.matcher.rejected else "invalid_request", problems[look.row])
    return faults


def _edits(sequence: Sequence) -> Edits:
    """The state of a sequence's edits, made when it is first needed and never behind its tokens."""
    edits = sequence.penalties
    if not isinstance(edits, Edits):
        edits = sequence.penalties = Edits(sequence.request.sampling, sequence.request.prompt)
    edits.follow(sequence.tokens)
    return edits


def _matcher(sequence: Sequence) -> GrammarMatcher | None:
    matcher = sequence.grammar
    assert matcher is None or isinstance(matcher, GrammarMatcher), "the core sets what the compiler returned"
    return matcher
