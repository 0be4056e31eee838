"""The engine for encoders: the same surface as `engine.core.Engine`, but every request is one forward.

Admission, sharing and deadlines are those of decoders. A step takes the most deserving request and, from those behind
it, the ones nearest in length, so that little is spent on padding. Every request that enters gets exactly one ending.
"""

import os
import secrets
import sys
import time
import traceback
from collections import Counter
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
    Learn,
    LoadAdapter,
    LoadSpeculator,
    Pool,
    Pooled,
    Status,
    UnloadAdapter,
    UnloadSpeculator,
)
from engine.models.encoder import Encoder, Prompt
from engine.models.encoder_spec import EncoderSpec
from engine.runner.placement import ONE_THREAD_PARAMETERS, choose_device, choose_dtype
from engine.runner.pooling import HOW, Pooler, vector_bytes
from engine.scheduling.admission import Admission, Refusal
from engine.scheduling.deadlines import Deadlines
from engine.scheduling.queue import Queue
from engine.sequence import Sequence, as_generate

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NO_ADAPTERS = "adapters are served on decoder models only; this base is an encoder"
# How far behind the first waiting request a step looks for company of about its length.
WINDOW = 256


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
        self.admission = Admission(config, spec, self.max_context)
        self._queue = Queue()
        self._deadlines = Deadlines()
        self._sequences: dict[tuple[bytes, str], Sequence] = {}
        self._arrivals = count()
        self._born = time.monotonic()
        self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would compute something."""
        return len(self._queue) > 0

    @property
    def patience_seconds(self) -> float | None:
        """No deadline passes while the engine is idle: whoever waits here makes it busy."""
        return None

    def submit(self, client: bytes, request: Generate) -> None:
        """An encoder writes nothing: always refused."""
        error = "this model is an encoder: it embeds and classifies, nothing else"
        ending = Finished(epoch=self.epoch, id=request.id, reason="error", code="unsupported", error=error)
        self.outbox.append((client, ending))

    def submit_pool(self, client: bytes, request: Pool) -> None:
        """Take a request in, or answer at once why not."""
        length = len(request.prompt)
        sequence = Sequence(
            client, as_generate(request, request.prompt), next(self._arrivals), length + 1, pool=request
        )
        refusal = self._refusal(client, request, sequence.request)
        if refusal is not None:
            self.outbox.append((client, sequence.ending(self.epoch, "error", *refusal)))
            return
        self._sequences[client, request.id] = sequence
        self.admission.enter(sequence)
        self._deadlines.enter(sequence)
        self._queue.enter(sequence)

    def cancel(self, client: bytes, request_id: str) -> None:
        """End a request whose client has read enough; unknown ids finished first."""
        sequence = self._sequences.get((client, request_id))
        if sequence is not None:
            self._drop(sequence, "cancelled")

    def cancel_client(self, client: bytes) -> None:
        """End everything a vanished client was waiting for; nothing more is sent to it."""
        for sequence in [sequence for sequence in self._sequences.values() if sequence.client == client]:
            self._drop(sequence, "cancelled")
        self.outbox = [(receiver, message) for receiver, message in self.outbox if receiver != client]

    def load_adapter(self, client: bytes, message: LoadAdapter) -> None:
        """Always refused."""
        self._done(client, message.id, NO_ADAPTERS)

    def unload_adapter(self, client: bytes, message: UnloadAdapter) -> None:
        """None is ever loaded, so it is done."""
        self._done(client, message.id)

    def load_speculator(self, client: bytes, message: LoadSpeculator) -> None:
        """Always refused."""
        self._done(client, message.id, "an encoder generates nothing, so there is nothing to draft")

    def unload_speculator(self, client: bytes, message: UnloadSpeculator) -> None:
        """None is ever loaded, so it is done."""
        self._done(client, message.id)

    def learn(self, client: bytes, message: Learn) -> None:
        """Nothing is drafted, so nothing is kept."""
        self._done(client, message.id)

    def forget(self, client: bytes, message: Forget) -> None:
        """Nothing is kept of any request."""
        self._done(client, message.id)

    def step(self) -> bool:
        """Compute one batch. False when there was nothing to compute."""
        for sequence in self._deadlines.due(time.perf_counter()):
            self._drop(sequence, "error", "deadline", "the request's deadline passed while it waited")
        batch = self._choose()
        if not batch:
            return False
        for sequence in batch:
            self._queue.take(sequence)
            self._queue.charge(sequence, self._cost(sequence))
            sequence.started = time.perf_counter()
        try:
            vectors = self._compute([_asked(sequence) for sequence in batch])
        except Exception as error:
            # A step that fails must not take the engine down: its requests get an answer, the others go on.
            traceback.print_exc(file=sys.stderr)
            for sequence in batch:
                self._end(sequence, "error", "internal", f"the step failed: {type(error).__name__}: {error}")
        else:
            for sequence, vector_N in zip(batch, vectors, strict=True):
                self._answer(sequence, vector_N)
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

    def _refusal(self, client: bytes, request: Pool, read: Generate) -> Refusal | None:
        """Why a request cannot be taken; `read` is its schedulable shape."""
        if (client, request.id) in self._sequences:
            return Refusal("invalid_request", f"request id {request.id!r} is already in flight")
        refusal = self.admission.refusal(read, request)
        if refusal is not None:
            return refusal
        if request.adapter is not None:
            return Refusal("unsupported", NO_ADAPTERS)
        if not 0 <= request.pair_start <= len(request.prompt):
            return Refusal("invalid_request", f"pair_start must lie between 0 and {len(request.prompt)}")
        if request.how not in HOW:
            return Refusal("invalid_request", f"pooling {request.how!r} is not one of {', '.join(HOW)}")
        return None

    def _choose(self) -> list[Sequence]:
        """The most deserving and its nearest in length, up to a step's tokens, padding counted.

        Company is taken from a share until it has its part of the step; only what the others leave is for anyone.
        """
        head = self._queue.head()
        if head is None:
            return []
        length, classify = len(head.tokens), _asked(head).how == "classify"
        company = [other for other in self._queue.front(WINDOW) if (_asked(other).how == "classify") == classify]
        company.sort(key=lambda other: abs(len(other.tokens) - length))
        part = self.config.step_tokens / len({other.request.share for other in (head, *company)})
        batch: dict[Sequence, None] = {}
        for most in (part, self.config.step_tokens):
            self._fill(batch, [head, *company], most)
        return list(batch)

    def _fill(self, batch: dict[Sequence, None], company: list[Sequence], most: float) -> None:
        """Add to the batch in the order given, of each share until it has `most` tokens of it."""
        step_tokens, rows = self.config.step_tokens, self.config.max_running
        spent: Counter[str] = Counter()
        for sequence in batch:
            spent[sequence.request.share] += self._cost(sequence)
        longest = max((len(sequence.tokens) for sequence in batch), default=0)
        for sequence in company:
            share = sequence.request.share
            if sequence in batch or spent[share] >= most:
                continue
            longest = max(longest, len(sequence.tokens))
            if batch and (longest * (len(batch) + 1) > step_tokens or len(batch) >= rows):
                return
            batch[sequence] = None
            spent[share] += self._cost(sequence)

    def _cost(self, sequence: Sequence) -> int:
        """Its part of a step, in tokens; a short prompt takes a place in the batch, too."""
        return max(len(sequence.tokens), self.config.step_tokens // self.config.max_running)

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

    def _answer(self, sequence: Sequence, vector_N: torch.Tensor) -> None:
        if bool(vector_N.isfinite().all()):
            self._close(sequence, sequence.pooled(self.epoch, vector_bytes(vector_N)))
        else:
            self._end(sequence, "error", "internal", "the model's states are not finite")

    def _drop(self, sequence: Sequence, reason: FinishReason, code: ErrorCode = "", error: str | None = None) -> None:
        """End a request that waits."""
        self._queue.take(sequence)
        self._end(sequence, reason, code, error)

    def _end(self, sequence: Sequence, reason: FinishReason, code: ErrorCode = "", error: str | None = None) -> None:
        self._close(sequence, sequence.ending(self.epoch, reason, code, error))

    def _close(self, sequence: Sequence, ending: Finished | Pooled) -> None:
        """The one ending: release everything, say so."""
        del self._sequences[sequence.client, sequence.request.id]
        self._queue.leave(sequence)
        self.admission.leave(sequence)
        self._deadlines.leave(sequence)
        self.outbox.append((sequence.client, ending))

    def _done(self, client: bytes, message_id: str, error: str = "") -> None:
        self.outbox.append((client, Done(epoch=self.epoch, id=message_id, error=error)))


def _asked(sequence: Sequence) -> Pool:
    assert sequence.pool is not None, "an encoder takes nothing else in"
    return sequence.pool
