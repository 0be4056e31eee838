"""Drafting with heads on torch's kernels: any device, and the reference of the native path.

With x_0 the last accepted token and s_0 = h, the LM head's input that produced it, head k computes (Medusa's residual
block, Hydra's view of the token before):

    in_k = s_{k-1} if recurrent else h          s_k = in_k + SiLU(W_k in_k + b_k + condition_k[x_{k-1}])
    logits_k = head · s_k                       x_k = the largest logit, or the largest with the verifier's own noise
    chance_k = sigmoid(c_k · [s_k; log_softmax(logits_k)[x_k]] + d_k)

Suffixes: R rows, S slots, E hidden size, O outputs, V pruned vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from engine.layers.sampler import Draw, gumbel, row_keys, scaled
from engine.speculation.loading import Speculator
from engine.speculation.slots import Ready, SlotTensors

# Tokens less likely than the best by more than this are not drafted: seldom drawn, and most of the noise's cost.
LOWEST = -11.0


class Ask(NamedTuple):
    """What one row wants: up to `most` tokens behind `token`, the last accepted one, from the heads in `slot`.

    `draw` is that of the first drafted token; the others follow at the positions behind it. Temperature 0 is greedy.
    """

    slot: int
    token: int
    draw: Draw
    most: int


class Guess(NamedTuple):
    """A draft. `chances[i]`: the heads' confidence that token i is accepted, given that those before it are."""

    tokens: list[int]
    chances: list[float]


class Drafter(Protocol):
    """Heads in slots that draft. `prepare` may run in any thread; everything else belongs to the engine's."""

    def prepare(self, speculator: Speculator) -> Ready:
        """Bring checked heads into the layout of the slots; touches none."""

    def fill(self, slot: int, ready: Ready) -> None:
        """Copy prepared heads into a slot, between two steps."""

    def clear(self, slot: int) -> None:
        """Draft nothing from a slot until it is filled again."""

    def propose(self, hidden_RE: torch.Tensor, asks: Sequence[Ask], floor: float = 0.0) -> list[Guess]:
        """One draft per ask, empty where its slot is."""


class TorchDrafter:
    """All rows at once, whatever their slots."""

    def __init__(self, slots: SlotTensors) -> None:
        self._slots = slots
        self.prepare, self.fill, self.clear = slots.prepare, slots.fill, slots.clear

    @torch.inference_mode()
    def propose(self, hidden_RE: torch.Tensor, asks: Sequence[Ask], floor: float = 0.0) -> list[Guess]:
        """One draft per ask; row i of `hidden_RE` (fp32) produced the token of ask i.

        A row stops behind the token with which its survival, the product of its chances, falls below `floor`.
        """
        wanted = [min(ask.most, self._slots.heads[ask.slot]) for ask in asks]
        rows = [row for row, most in enumerate(wanted) if most > 0]
        guesses = [Guess([], []) for _ in asks]
        if not rows:
            return guesses
        index = torch.tensor(rows, device=hidden_RE.device)
        drafted = self._draft(
            hidden_RE[index].float(), [asks[row] for row in rows], [wanted[row] for row in rows], floor
        )
        for row, tokens, chances in zip(rows, *drafted, strict=True):
            guesses[row] = _until(floor, tokens[: wanted[row]], chances[: wanted[row]])
        return guesses

    def _draft(
        self, hidden_RE: torch.Tensor, asks: list[Ask], wanted: list[int], floor: float
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and chances [R][depth] of rows whose slots are filled."""
        slots, device = self._slots, hidden_RE.device
        used = sorted({ask.slot for ask in asks})
        slots_R = torch.tensor([ask.slot for ask in asks], device=device)
        places_R = slots.places_ST[slots_R, torch.tensor([ask.token for ask in asks], device=device)].long()
        wanted_R = torch.tensor(wanted, device=device)
        state_RE, survival_R = hidden_RE, torch.ones(len(asks), device=device)
        tokens, chances = [], []
        for head in range(max(wanted)):
            state_RE = self._state(head, hidden_RE, state_RE, places_R, slots_R, used)
            logits_RV = _own(state_RE.to(slots.dtype), slots.head_SVE, slots_R, used)
            logits_RV = logits_RV.masked_fill(slots.outside_SV[slots_R], float("-inf"))
            places_R = _choose(logits_RV, slots.tokens_SV, slots_R, asks, head)
            tokens.append(slots.tokens_SV[slots_R, places_R])
            chances.append(self._chance(head, state_RE, logits_RV, places_R, slots_R))
            survival_R = survival_R * chances[-1]
            # Asking a GPU whether all rows are done would cost more than it could save.
            if device.type == "cpu" and bool(((survival_R < floor) | (wanted_R <= head + 1)).all()):
                break
        return torch.stack(tokens, 1).tolist(), torch.stack(chances, 1).tolist()

    def _state(
        self,
        head: int,
        hidden_RE: torch.Tensor,
        state_RE: torch.Tensor,
        places_R: torch.Tensor,
        slots_R: torch.Tensor,
        used: list[int],
    ) -> torch.Tensor:
        """s_k."""
        slots = self._slots
        input_RE = torch.where(slots.recurrent_S[slots_R, None], state_RE, hidden_RE)
        lifted_RE = _own(input_RE.to(slots.dtype), slots.weight_SKEE[:, head], slots_R, used)
        told_RE = slots.condition_SCVE[slots_R, slots.table_SK[slots_R, head], places_R].float()
        told_RE = told_RE * slots.conditioned_S[slots_R, None]
        return input_RE + torch.nn.functional.silu(lifted_RE + slots.bias_SKE[slots_R, head] + told_RE)

    def _chance(
        self,
        head: int,
        state_RE: torch.Tensor,
        logits_RV: torch.Tensor,
        places_R: torch.Tensor,
        slots_R: torch.Tensor,
    ) -> torch.Tensor:
        slots = self._slots
        logprob_R = logits_RV.gather(1, places_R[:, None]).squeeze(1) - logits_RV.logsumexp(-1)
        weight_RF = slots.confidence_SKF[slots_R, head]
        score_R = (weight_RF[:, :-1] * state_RE).sum(-1) + weight_RF[:, -1] * logprob_R
        return torch.sigmoid(score_R + slots.confidence_bias_SK[slots_R, head]).nan_to_num(nan=0.0)


def _own(x_RI: torch.Tensor, stack_SOI: torch.Tensor, slots_R: torch.Tensor, used: list[int]) -> torch.Tensor:
    """Each row times the matrix of its slot, fp32. Reading every slot's beats copying a matrix per row."""
    if len(used) == 1:
        return (x_RI @ stack_SOI[used[0]].T).float()
    all_SRO = x_RI @ stack_SOI.transpose(1, 2)
    return all_SRO[slots_R, torch.arange(len(x_RI), device=x_RI.device)].float()


def _choose(
    logits_RV: torch.Tensor, tokens_SV: torch.Tensor, slots_R: torch.Tensor, asks: list[Ask], head: int
) -> torch.Tensor:
    """Per row the drafted token's place in the pruned vocabulary; drawn ones with the noise of the real token ids."""
    best_R = logits_RV.argmax(-1)
    if all(ask.draw.sampling.temperature == 0 for ask in asks):
        return best_R
    draws = [ask.draw._replace(position=ask.draw.position + head) for ask in asks]
    scaled_RV, floor_R1 = scaled(logits_RV, draws, LOWEST)
    noise_RV = gumbel(row_keys(draws, logits_RV.device)[:, None], tokens_SV[slots_R])
    noisy_RV = (scaled_RV.double() + noise_RV).masked_fill(scaled_RV < floor_R1, float("-inf"))
    greedy_R = torch.tensor([draw.sampling.temperature == 0 for draw in draws], device=logits_RV.device)
    return torch.where(greedy_R, best_R, noisy_RV.argmax(-1))


def _until(floor: float, tokens: list[int], chances: list[float]) -> Guess:
    """The draft up to and with the token at which it becomes less likely than `floor` to survive."""
    survival = 1.0
    for length, chance in enumerate(chances, 1):
        survival *= chance
        if survival < floor:
            return Guess(tokens[:length], chances[:length])
    return Guess(tokens, chances)
