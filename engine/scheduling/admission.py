"""Which requests are taken in. Everything that can be known to fail is refused here, before it holds anything."""

import math
import time
from collections import Counter, deque
from typing import NamedTuple

from engine.config import EngineConfig
from engine.layers.sampler import invalid_sampling
from engine.messages import ErrorCode, Generate, Pool
from engine.models.encoder_spec import EncoderSpec
from engine.models.spec import DecoderSpec
from engine.sequence import Sequence

# How much of the queue one share may fill, so that others always find room.
SHARE_OF_QUEUE = 0.75
# Endings looked at to say when a place will be free, and the bounds of what is said.
RECENT_ENDINGS = 64
SHORTEST_RETRY, LONGEST_RETRY = 1.0, 60.0
LONGEST_DEADLINE = 1e6


class Refusal(NamedTuple):
    """Why a request is not taken, and for `overloaded`, where it can be told, when to try again."""

    code: ErrorCode
    reason: str
    retry_after_seconds: float = 0.0


class Admission:
    """Counts who is in flight and judges newcomers."""

    def __init__(self, config: EngineConfig, spec: DecoderSpec | EncoderSpec, max_context: int) -> None:
        self._config, self._spec, self._max_context = config, spec, max_context
        self._shares: Counter[str] = Counter()
        self._in_flight = 0
        self._endings: deque[float] = deque(maxlen=RECENT_ENDINGS)

    def enter(self, sequence: Sequence) -> None:
        """A request was taken in; it must leave once."""
        self._shares[sequence.request.share] += 1
        self._in_flight += 1

    def leave(self, sequence: Sequence) -> None:
        """A request has ended."""
        share = sequence.request.share
        self._shares[share] -= 1
        if not self._shares[share]:
            del self._shares[share]
        self._in_flight -= 1
        self._endings.append(time.perf_counter())

    def refusal(self, request: Generate, pool: Pool | None = None) -> Refusal | None:
        """Why this request cannot be taken; None when it can."""
        return self._overload(request.share) or self._unsupported(pool) or self._invalid(request, pool)

    def _overload(self, share: str) -> Refusal | None:
        most = self._config.max_waiting
        if self._in_flight >= most:
            reason = f"{self._in_flight} requests are in flight already; try again later"
            return Refusal("overloaded", reason, self._retry_after())
        if self._shares[share] >= math.ceil(SHARE_OF_QUEUE * most):
            reason = f"{self._shares[share]} requests of this key are in flight already; try again later"
            return Refusal("overloaded", reason, self._retry_after())
        return None

    def _retry_after(self) -> float:
        """Seconds in which a tenth of what is in flight will end at the recent pace; 0 when there is no pace yet."""
        if len(self._endings) < 2:
            return 0.0
        pace = len(self._endings) / max(time.perf_counter() - self._endings[0], 1e-3)
        return min(max(self._in_flight / 10 / pace, SHORTEST_RETRY), LONGEST_RETRY)

    def _unsupported(self, pool: Pool | None) -> Refusal | None:
        classifies = bool(self._spec.labels)
        if pool is None and classifies:
            reason = "this model classifies and has no language-model head; ask it for classes"
            return Refusal("unsupported", reason)
        if pool is not None and pool.how == "classify" and not classifies:
            return Refusal("unsupported", "this model has no classification head")
        return None

    def _invalid(self, request: Generate, pool: Pool | None) -> Refusal | None:
        length, vocabulary = len(request.prompt), self._spec.vocab_size
        if not length:
            return Refusal("invalid_request", "the prompt is empty")
        # A prompt that is only pooled needs no room for an answer.
        if length + (pool is None) > self._max_context:
            room = f"{self._max_context} with the answer" if pool is None else f"{self._max_context}"
            return Refusal("prompt_too_long", f"the prompt has {length} tokens; the context holds {room}")
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            return Refusal("invalid_request", f"token ids must lie between 0 and {vocabulary - 1}")
        if not 0 <= request.deadline_seconds <= LONGEST_DEADLINE:
            return Refusal(
                "invalid_request", f"deadline_seconds must be 0 (never) or up to {LONGEST_DEADLINE:g} seconds"
            )
        if pool is None and (reason := invalid_sampling(request.sampling, vocabulary)):
            return Refusal("invalid_request", reason)
        return None
