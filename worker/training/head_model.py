"""Speculator heads in training: residual blocks on the LM head's input, told the token drafted before.

Head k starts from a state of the base model (or, recurrent, from head k-1's) and adds SiLU(weight_k in + bias_k +
condition_k[previous token]); the pruned LM head turns the sum into logits. Weights begin at zero, so that training
begins at what the state itself says about later tokens.
Suffixes: T states (all of one batch of requests), K heads, E hidden size, V pruned vocabulary, N rows of one head.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.layers.sampler import gumbel

# Weight of head k in the loss: what the first heads miss, the later ones are never asked for.
DISCOUNT = 0.8
# How fast the loss turns from KL to total variation with acceptance (LK losses: lambda = exp(-3 alpha)).
TURN = 3.0
# Words that noise is made for where the others together are chosen less often than this.
CANDIDATES, MOST_REST = 64, 1e-3


@dataclass(frozen=True)
class Batch:
    """States of whole requests laid end to end; state t is the LM head's input that produced `tokens_T[t]`.

    `left_T` counts the answer's tokens behind it, `weight_T` sums to 1 over each request, `places_T` are rows of the
    pruned vocabulary (V for tokens outside it), `keys_T` the noise keys of each token's own position, `heat_T` the
    request's temperature.
    """

    hidden_TE: torch.Tensor
    tokens_T: torch.Tensor
    places_T: torch.Tensor
    left_T: torch.Tensor
    weight_T: torch.Tensor
    keys_T: torch.Tensor
    heat_T: torch.Tensor

    def rows(self, head: int) -> torch.Tensor:
        """Indices [N] of the states from which head `head` (from 0) has a token to draft."""
        return torch.nonzero(self.left_T > head).squeeze(1)


class Heads(nn.Module):
    """K heads over a frozen pruned LM head. `condition` holds what the previous token adds inside the SiLU."""

    head_VE: torch.Tensor

    def __init__(self, head_VE: torch.Tensor, heads: int, *, conditioning: str, recurrent: bool) -> None:
        super().__init__()
        words, hidden = head_VE.shape
        self.recurrent = recurrent
        self.register_buffer("head_VE", head_VE.float().contiguous())
        self.weight = nn.Parameter(torch.zeros(heads, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(heads, hidden))
        self.condition = nn.Parameter(torch.zeros(heads, words + 1, hidden)) if conditioning == "hydra" else None
        self.confidence = nn.Parameter(torch.zeros(heads, hidden + 1))
        self.confidence_bias = nn.Parameter(torch.zeros(heads))

    @property
    def count(self) -> int:
        """K."""
        return len(self.bias)

    def drafting(self) -> list[nn.Parameter]:
        """What shapes the drafts; the rest only says how sure they are."""
        return [each for each in (self.weight, self.bias, self.condition) if each is not None]

    def step(self, head: int, state_NE: torch.Tensor, previous_N: torch.Tensor) -> torch.Tensor:
        """The state [N, E] from which head `head` drafts, given rows of the pruned vocabulary for the token before."""
        inner_NE = torch.nn.functional.linear(state_NE, self.weight[head], self.bias[head])
        if self.condition is not None:
            inner_NE = inner_NE + torch.nn.functional.embedding(previous_N, self.condition[head])
        return state_NE + torch.nn.functional.silu(inner_NE)

    def logits(self, head: int, state_NE: torch.Tensor, previous_N: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Logits [N, V] over the pruned vocabulary."""
        return state_NE @ self.head_VE.T


def teacher_forced(heads: Heads, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each head the rows [N] it is asked for and its states [N, E] there, fed with the logged tokens."""
    found = []
    rows_N = batch.rows(0)
    state_NE = batch.hidden_TE[rows_N]
    for head in range(heads.count):
        if head:
            keep = batch.left_T[rows_N] > head
            state_NE, rows_N = state_NE[keep], rows_N[keep]
        source_NE = state_NE if heads.recurrent else batch.hidden_TE[rows_N]
        state_NE = heads.step(head, source_NE, batch.places_T[rows_N + head])
        found.append((rows_N, state_NE))
    return found


class _Distance(torch.autograd.Function):
    """Weighted lambda KL + (1 - lambda) TV between softmax(logits) and targets, its gradient made on the way."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context has no public type
        logits_NV: torch.Tensor,
        target_NV: torch.Tensor,
        weight_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        drafted_NV = torch.log_softmax(logits_NV, -1)
        cross_N = -(target_NV * drafted_NV).sum(-1)
        drafted_NV.exp_()
        difference_NV = drafted_NV - target_NV
        variation_N = difference_NV.abs().sum(-1) / 2
        total = weight_N.sum().clamp_min(1e-9)
        alpha = 1 - (weight_N * variation_N).sum() / total
        mix = math.exp(-TURN * float(alpha))
        sign_NV = difference_NV.sign()
        pull_N1 = (drafted_NV * sign_NV).sum(-1, keepdim=True)
        gradient_NV = sign_NV.sub_(pull_N1).mul_(drafted_NV).mul_((1 - mix) / 2).add_(difference_NV, alpha=mix)
        ctx.save_for_backward(gradient_NV.mul_(weight_N[:, None]))
        return (weight_N * (mix * cross_N + (1 - mix) * variation_N)).sum(), alpha

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401
        (gradient_NV,) = ctx.saved_tensors
        return gradients[0] * gradient_NV, None, None


def loss(heads: Heads, batch: Batch, target_TV: torch.Tensor) -> torch.Tensor:
    """Mean over the batch's requests of the discounted distance of every head from the base model, a scalar.

    `target_TV` is what the base model itself says at each state: its probabilities over the pruned vocabulary.
    """
    total = batch.hidden_TE.new_zeros(())
    for head, (rows_N, state_NE) in enumerate(teacher_forced(heads, batch)):
        if not len(rows_N):
            break
        logits_NV = heads.logits(head, state_NE, batch.places_T[rows_N + head])
        value, _ = _Distance.apply(logits_NV, target_TV[rows_N + head + 1], batch.weight_T[rows_N])  # type: ignore[no-untyped-call] # torch ships no types for it
        total = total + DISCOUNT**head * value
    return total / batch.weight_T.sum().clamp_min(1e-9)


def targets(head_VE: torch.Tensor, hidden_TE: torch.Tensor) -> torch.Tensor:
    """The base model's probabilities [T, V] over the pruned vocabulary."""
    return torch.softmax(hidden_TE @ head_VE.T, -1)


@dataclass(frozen=True)
class Drafted:
    """One head's drafts: rows [N] of the batch, confidence features [N, E + 1], and hits [N]."""

    rows_N: torch.Tensor
    features_NF: torch.Tensor
    hit_N: torch.Tensor


@torch.no_grad()
def drafts(heads: Heads, batch: Batch, tokens_V: torch.Tensor) -> list[Drafted]:
    """What each head drafts after the logged tokens, with the noise that drew these, and whether it was right."""
    return [
        _draft(heads, head, state_NE, rows_N, batch, tokens_V)
        for head, (rows_N, state_NE) in enumerate(teacher_forced(heads, batch))
    ]


def _draft(
    heads: Heads, head: int, state_NE: torch.Tensor, rows_N: torch.Tensor, batch: Batch, tokens_V: torch.Tensor
) -> Drafted:
    after_N = rows_N + head + 1
    logits_NV = heads.logits(head, state_NE, batch.places_T[rows_N + head])
    best_N = logits_NV.argmax(-1)
    warm_M = torch.nonzero(batch.heat_T[rows_N] > 0).squeeze(1)
    if len(warm_M):
        scaled_MV = logits_NV[warm_M] / batch.heat_T[rows_N[warm_M], None]
        best_N[warm_M] = drawn(scaled_MV, batch.keys_T[after_N[warm_M]], tokens_V)
    chance_N1 = torch.log_softmax(logits_NV, -1).gather(1, best_N[:, None])
    return Drafted(rows_N, torch.cat([state_NE, chance_N1], 1), tokens_V[best_N] == batch.tokens_T[after_N])


def drawn(scaled_MV: torch.Tensor, keys_M: torch.Tensor, tokens_V: torch.Tensor) -> torch.Tensor:
    """The sampler's choice [M] of the pruned words, from logits over temperature and its noise keys.

    Noise is dear, so where few words hold nearly all probability only these get any.
    """
    likely = scaled_MV.topk(min(CANDIDATES, len(tokens_V)), -1)
    rest_M = 1 - (likely.values - scaled_MV.logsumexp(-1, keepdim=True)).exp().sum(-1)
    found_M = _noisiest(likely.values, likely.indices, keys_M, tokens_V)
    flat_F = torch.nonzero(rest_M > MOST_REST).squeeze(1)
    if len(flat_F):
        words_FV = torch.arange(len(tokens_V)).expand(len(flat_F), -1)
        found_M[flat_F] = _noisiest(scaled_MV[flat_F], words_FV, keys_M[flat_F], tokens_V)
    return found_M


def _noisiest(
    scaled_NC: torch.Tensor, words_NC: torch.Tensor, keys_N: torch.Tensor, tokens_V: torch.Tensor
) -> torch.Tensor:
    width = words_NC.shape[1]
    noise_NC = gumbel(keys_N.repeat_interleave(width), tokens_V[words_NC].reshape(-1)).view(-1, width)
    return words_NC.gather(1, (scaled_NC.double() + noise_NC).argmax(-1, keepdim=True)).squeeze(1)


@torch.no_grad()
def lengths(heads: Heads, batch: Batch, tokens_V: torch.Tensor) -> torch.Tensor:
    """Per state [T] how many tokens a step that begins there yields: one, and the drafts before the first wrong one."""
    found_T = torch.ones(len(batch.tokens_T))
    alive_T = torch.ones(len(batch.tokens_T), dtype=torch.bool)
    for drafted in drafts(heads, batch, tokens_V):
        hit_T = torch.zeros_like(alive_T)
        hit_T[drafted.rows_N] = drafted.hit_N
        alive_T &= hit_T
        found_T += alive_T
    return found_T
