"""The engine for encoders: the same surface as `engine.core.Engine`, but every request is one forward.

Requests wait by priority and arrival; a step takes the first and, from those behind it, the ones nearest in length, so
that little is spent on padding. Every request that enters gets exactly one ending.
"""

import os
import secrets
import sys
import time
import traceback
from bisect import insort
from dataclasses import dataclass, field
from itertools import count

import torch

from engine.config import EngineConfig
from engine.digest import base_digest
from engine.messages import (
    Done,
    ErrorCode,
    Finished,
    FinishReason,
    Forget,
    FromEngine,
    Generate,
    LoadAdapter,
    Pool,
    Pooled,
    Status,
    UnloadAdapter,
)
from engine.models.encoder import Encoder, Prompt
from engine.models.encoder_spec import EncoderSpec
from engine.runner.placement import ONE_THREAD_PARAMETERS, choose_device, choose_dtype
from engine.runner.pooling import HOW, Pooler, vector_bytes
from engine.sequence import PRIORITY_RANK

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NO_ADAPTERS = "adapters are served on decoder models only; this base is an encoder"
# How far behind the first waiting request a step looks for company of about its length.
WINDOW = 256


@dataclass(eq=False)
class Waiting:
    """One request that has not been computed."""

    client: bytes
    request: Pool
    arrival: int
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts the most deserving first."""
        return PRIORITY_RANK[self.request.priority], self.arrival

    @property
    def overdue(self) -> bool:
        """Whether its deadline has passed."""
        limit = self.request.deadline_seconds
        return 0 < limit < time.perf_counter() - self.arrived


class EncoderEngine:
    """One encoder and who waits for it. `outbox` holds (client, message) pairs to be sent, in order."""

    def __init__(self, config: EngineConfig, spec: EncoderSpec) -> None:
        self.config = config
        self.epoch = secrets.randbits(52)
        self.outbox: list[tuple[bytes, FromEngine]] = []
        self.max_context = min(config.max_context or spec.max_positions, spec.max_positions)
        if config.precision == "int8":
            raise ValueError("--precision int8 is for decoders; encoders run in fp32 or bf16")
        device = choose_device(config)
        self.encoder = Encoder(spec, config.model, dtype=choose_dtype(config, device), device=device)
        small = self.encoder.parameters < ONE_THREAD_PARAMETERS
        torch.set_num_threads(config.threads or (1 if small else len(os.sched_getaffinity(0))))
        self.base = base_digest(config.model)
        self._queue: list[Waiting] = []
        self._known: dict[tuple[bytes, str], Waiting] = {}
        self._arrivals = count()
        self._born = time.monotonic()
        self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._queue)

    @property
    def patience_seconds(self) -> float | None:
        """No deadline passes while the engine is idle: whoever waits here makes it busy."""
        return None

    def submit(self, client: bytes, request: Generate) -> None:
        """An encoder writes nothing: always refused."""
        self._refuse(client, request, "unsupported", "this model is an encoder: it embeds and classifies, nothing else")

    def submit_pool(self, client: bytes, request: Pool) -> None:
        """Take a request in, or answer at once why not."""
        refusal = self._refusal(client, request)
        if refusal is not None:
            self._refuse(client, request, *refusal)
            return
        waiting = Waiting(client, request, next(self._arrivals))
        self._known[client, request.id] = waiting
        insort(self._queue, waiting, key=lambda other: other.rank)

    def cancel(self, client: bytes, request_id: str) -> None:
        """End a request whose client has read enough; unknown ids finished first."""
        waiting = self._known.get((client, request_id))
        if waiting is not None:
            self._fail(waiting, "cancelled")

    def cancel_client(self, client: bytes) -> None:
        """End everything a vanished client was waiting for; nothing more is sent to it."""
        for waiting in [waiting for waiting in self._queue if waiting.client == client]:
            self._forget(waiting)
        self.outbox = [(receiver, message) for receiver, message in self.outbox if receiver != client]

    def load_adapter(self, client: bytes, message: LoadAdapter) -> None:
        """Always refused."""
        self._done(client, message.id, NO_ADAPTERS)

    def unload_adapter(self, client: bytes, message: UnloadAdapter) -> None:
        """None is ever loaded, so it is done."""
        self._done(client, message.id)

    def forget(self, client: bytes, message: Forget) -> None:
        """Nothing is kept of any request."""
        self._done(client, message.id)

    def step(self) -> bool:
        """Compute one batch. False when there was nothing to compute."""
        for waiting in [waiting for waiting in self._queue if waiting.overdue]:
            self._fail(waiting, "error", "deadline", "the request's deadline passed while it waited")
        batch = self._choose()
        if not batch:
            return False
        started = time.perf_counter()
        try:
            vectors = self._compute([waiting.request for waiting in batch])
        except Exception as error:
            # A step that fails must not take the engine down: its requests get an answer, the others go on.
            traceback.print_exc(file=sys.stderr)
            for waiting in batch:
                self._fail(waiting, "error", "internal", f"the step failed: {type(error).__name__}: {error}")
        else:
            for waiting, vector_N in zip(batch, vectors, strict=True):
                self._answer(waiting, vector_N, started)
        self._steps += 1
        return True

    def status(self, request_id: str) -> Status:
        """What the engine is and does now."""
        return Status(
            epoch=self.epoch,
            id=request_id,
            base=self.base,
            model=str(self.config.model),
            dtype=DTYPE_NAMES[self.encoder.dtype],
            device=self.encoder.device.type,
            threads=torch.get_num_threads(),
            max_context=self.max_context,
            running=0,
            waiting=len(self._queue),
            blocks_total=0,
            blocks_free=0,
            slots=[],
            slots_total=0,
            steps=self._steps,
            generated_tokens=0,
            uptime_seconds=time.monotonic() - self._born,
            pid=os.getpid(),
            encoder=True,
            labels=list(self.encoder.spec.labels),
        )

    def close(self) -> None:
        """What is in flight is simply gone: the epoch tells clients."""
        self._queue.clear()
        self._known.clear()

    def _refusal(self, client: bytes, request: Pool) -> tuple[ErrorCode, str] | None:
        """Code and sentence when a request cannot be taken."""
        spec, length = self.encoder.spec, len(request.prompt)
        if (client, request.id) in self._known:
            return "invalid_request", f"request id {request.id!r} is already in flight"
        if len(self._queue) >= self.config.max_waiting:
            return "overloaded", f"{len(self._queue)} requests are in flight already; try again later"
        if request.adapter is not None:
            return "unsupported", NO_ADAPTERS
        if not length:
            return "invalid_request", "the prompt is empty"
        if length > self.max_context:
            return "prompt_too_long", f"the prompt has {length} tokens; the context holds {self.max_context}"
        if min(request.prompt) < 0 or max(request.prompt) >= spec.vocab_size:
            return "invalid_request", f"token ids must lie between 0 and {spec.vocab_size - 1}"
        if not 0 <= request.pair_start <= length:
            return "invalid_request", f"pair_start must lie between 0 and {length}"
        if request.how not in HOW:
            return "invalid_request", f"pooling {request.how!r} is not one of {', '.join(HOW)}"
        if request.how == "classify" and not spec.labels:
            return "unsupported", "this model has no classification head"
        return None

    def _choose(self) -> list[Waiting]:
        """The first in the queue and its nearest in length, up to a step's tokens, padding counted."""
        if not self._queue:
            return []
        head = self._queue[0]
        length, classify = len(head.request.prompt), head.request.how == "classify"
        company = [other for other in self._queue[1:WINDOW] if (other.request.how == "classify") == classify]
        batch, longest = [head], length
        for other in sorted(company, key=lambda other: abs(len(other.request.prompt) - length)):
            longest = max(longest, len(other.request.prompt))
            if longest * (len(batch) + 1) > self.config.step_tokens or len(batch) >= self.config.max_running:
                break
            batch.append(other)
        return batch

    def _compute(self, requests: list[Pool]) -> list[torch.Tensor]:
        prompts = [Prompt(request.prompt, request.pair_start) for request in requests]
        if requests[0].how == "classify":
            return list(self.encoder.scores(prompts))
        vectors = []
        for request, states_TE in zip(requests, self.encoder.hidden(prompts), strict=True):
            pooler = Pooler(len(request.prompt), request.how)
            pooler.add(states_TE)
            vectors.append(pooler.vector())
        return vectors

    def _answer(self, waiting: Waiting, vector_N: torch.Tensor, started: float) -> None:
        if not bool(vector_N.isfinite().all()):
            self._fail(waiting, "error", "internal", "the model's states are not finite")
            return
        self._forget(waiting)
        reply = Pooled(
            epoch=self.epoch,
            id=waiting.request.id,
            vector=vector_bytes(vector_N),
            prompt_tokens=len(waiting.request.prompt),
            queue_seconds=started - waiting.arrived,
            total_seconds=time.perf_counter() - waiting.arrived,
        )
        self.outbox.append((waiting.client, reply))

    def _fail(self, waiting: Waiting, reason: FinishReason, code: ErrorCode = "", error: str | None = None) -> None:
        self._forget(waiting)
        ending = Finished(epoch=self.epoch, id=waiting.request.id, reason=reason, code=code, error=error)
        self.outbox.append((waiting.client, ending))

    def _forget(self, waiting: Waiting) -> None:
        del self._known[waiting.client, waiting.request.id]
        self._queue.remove(waiting)

    def _refuse(self, client: bytes, request: Generate | Pool, code: ErrorCode, error: str) -> None:
        ending = Finished(epoch=self.epoch, id=request.id, reason="error", code=code, error=error)
        self.outbox.append((client, ending))

    def _done(self, client: bytes, message_id: str, error: str = "") -> None:
        self.outbox.append((client, Done(epoch=self.epoch, id=message_id, error=error)))
