"""A request on its way: its tokens, what of them is cached, who it holds, and its one ending."""

import time
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from engine.memory.prefix import Node, Root
from engine.messages import ErrorCode, Finished, FinishReason, Generate, Pool, Pooled, Sampling

PRIORITY_RANK = {"interactive": 0, "batch": 1}
by_rank = attrgetter("rank")


@dataclass(eq=False)
class Sequence:
    """One running or waiting request. The scheduler owns blocks and `computed`; the core owns the slot and the ending.

    `tokens` is prompt and completion; the first `computed` of them have keys and values in `blocks`. Of these blocks
    the first `chained` are known to the prefix cache; `tip` is the last such (None once no more may be added).
    `rank` sorts the most deserving first: interactive before batch, then oldest.
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
    # What drafts for it, and what its drafts came to: see speculation/drafting.
    speculation: object | None = None
    drafted: int = 0
    accepted: int = 0
    # Whether its answer may join its namespace's corpus; not once that was forgotten.
    learns: bool = field(init=False)
    # A request for a vector: what it asked for and, while it runs, what makes the vector.
    pool: Pool | None = None
    pooler: object | None = None
    scores: list[float] = field(default_factory=list)
    ranked: list[list[tuple[int, float]]] = field(default_factory=list)
    queued: bool = False
    root: Root | None = None
    tip: Root | Node | None = None
    chained: int = 0
    promises: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.learns = self.request.learn
        self.stops = frozenset(self.request.sampling.stop_token_ids)
        sampling = self.request.sampling
        penalised = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        # Whether nothing but a grammar can stand between the model's logits and the sampler, at any place.
        self.unedited = not (penalised or sampling.logit_bias or sampling.min_tokens)
        self.rank = PRIORITY_RANK[self.request.priority], self.arrival
        # Whoever needs the states of every token computes every token.
        every = self.pool is not None and self.pool.how in ("mean", "first")
        self.reuses = not (every or self.request.prompt_logprobs)

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

    def learn(self, start: int, scores: list[float], ranked: list[list[tuple[int, float]]]) -> None:
        """Take log-probabilities of the prompt tokens behind `start`; they come anew after a preemption."""
        del self.scores[start:], self.ranked[start:]
        self.scores += scores
        self.ranked += ranked

    def ending(
        self,
        epoch: int,
        reason: FinishReason,
        code: ErrorCode = "",
        error: str | None = None,
        retry_after_seconds: float = 0.0,
    ) -> Finished:
        """The Finished message; the caller guards that it is built once."""
        now = time.perf_counter()
        return Finished(
            epoch=epoch,
            id=self.request.id,
            reason=reason,
            adapter=self.request.adapter,
            error=error,
            code=code,
            retry_after_seconds=retry_after_seconds,
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.produced,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            queue_seconds=(self.started or now) - self.arrived,
            first_token_seconds=(self.first_token or now) - self.arrived,
            total_seconds=now - self.arrived,
        )

    def pooled(self, epoch: int, vector: bytes) -> Pooled:
        """The Pooled message; the caller guards that it is built once."""
        now = time.perf_counter()
        return Pooled(
            epoch=epoch,
            id=self.request.id,
            vector=vector,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            queue_seconds=(self.started or now) - self.arrived,
            total_seconds=now - self.arrived,
        )


def as_generate(request: Pool, prompt: list[int]) -> Generate:
    """What a request for a vector looks like to everybody who only schedules it."""
    return Generate(
        id=request.id,
        prompt=prompt,
        sampling=Sampling(temperature=0.0, seed=0, max_tokens=1),
        adapter=request.adapter,
        namespace=request.namespace,
        cache_salt=request.cache_salt,
        priority=request.priority,
        share=request.share,
        deadline_seconds=request.deadline_seconds,
    )
