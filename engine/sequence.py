"""A request on its way: its tokens, what of them is cached, who it holds, and its one ending."""

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.messages import Finished, FinishReason, Generate, Pool

PRIORITY_RANK = {"interactive": 0, "batch": 1}


@dataclass(eq=False)
class Sequence:
    """One running or waiting request. The scheduler owns blocks and `computed`; the core owns the slot and the ending.

    `tokens` is prompt and completion; the first `computed` of them have keys and values in `blocks`.
    """

    client: bytes
    request: Generate
    arrival: int
    limit: int
    tokens: list[int] = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    table: NDArray[np.int64] | None = None
    slot: int = 0
    ended: bool = False
    preemptions: int = 0
    # What constrains the answer (set by the core) and what edits its logits (made by the runner): see runner/sampling.
    grammar: object | None = None
    penalties: object | None = None
    pool: Pool | None = None
    cached_tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.stops = frozenset(self.request.sampling.stop_token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts the most deserving first: interactive before batch, then oldest."""
        return PRIORITY_RANK[self.request.priority], self.arrival

    @property
    def produced(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are not cached: 1 while generating, more while its prompt is read."""
        return len(self.tokens) - self.computed

    def accept(self, token: int, logprob: float) -> FinishReason | None:
        """Append a sampled token; the reason when it ends the sequence."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.stops:
            return "stop"
        if len(self.tokens) >= self.limit:
            return "length"
        return None

    def ending(self, epoch: int, reason: FinishReason, code: str = "", error: str | None = None) -> Finished:
        """The Finished message; the caller guards that it is built once."""
        now = time.perf_counter()
        return Finished(
            epoch=epoch,
            id=self.request.id,
            reason=reason,
            adapter=self.request.adapter,
            error=error,
            code=code,  # type: ignore[arg-type]  # callers pass members of the Literal
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.produced,
            queue_seconds=(self.started or now) - self.arrived,
            first_token_seconds=(self.first_token or now) - self.arrived,
            total_seconds=now - self.arrived,
        )
