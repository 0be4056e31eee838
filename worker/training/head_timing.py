"""What drafting costs on this machine: the engine's own drafters, timed with the heads that were trained."""

import time

import torch

from engine.layers.sampler import Draw
from engine.messages import Sampling
from engine.native.decoder import NativeDecoder
from engine.native.drafting import NativeDrafter
from engine.runner.forward import Forward
from engine.speculation.heads import Ask, Drafter, TorchDrafter
from engine.speculation.loading import Limits, Speculator
from engine.speculation.slots import SlotTensors

# Streams at once, as the gate predicts for.
ROWS = (1, 16)
REPEATS = 15
SLOT = 1


def drafting_ms(forward: Forward, speculator: Speculator) -> dict[str, float]:
    """Milliseconds that one head takes for a batch of so many rows: the fastest of a few drafts of all heads."""
    hidden = forward.spec.hidden_size
    limits = Limits(
        hidden=hidden, tokens=forward.spec.vocab_size, heads=speculator.heads, vocabulary=speculator.vocabulary
    )
    drafter = _drafter(forward, limits)
    drafter.fill(SLOT, drafter.prepare(speculator))
    found = {}
    for rows in ROWS:
        hidden_RE = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows)).to(forward.device)
        greedy = Sampling(temperature=0.0, seed=0, max_tokens=1)
        asks = [Ask(SLOT, 0, Draw(greedy, 0, row), speculator.heads) for row in range(rows)]
        found[str(rows)] = 1000 * min(_timed(drafter, hidden_RE, asks) for _ in range(REPEATS)) / speculator.heads
    return found


def _drafter(forward: Forward, limits: Limits) -> Drafter:
    if isinstance(forward, NativeDecoder):
        return NativeDrafter(forward, limits, SLOT)
    return TorchDrafter(SlotTensors(limits, SLOT, forward.dtype, forward.device))


def _timed(drafter: Drafter, hidden_RE: torch.Tensor, asks: list[Ask]) -> float:
    began = time.perf_counter()
    drafter.propose(hidden_RE, asks)
    return time.perf_counter() - began
