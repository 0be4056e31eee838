"""The engine itself, without a process around it: requests in, messages out, one step at a time.

Every request that enters gets exactly one ending; blocks, slots and references are released in `_end` and nowhere
else. Not thread-safe: one thread submits, steps and empties the outbox.
"""

import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count

import torch

from engine.adapters.loading import AdapterReader
from engine.adapters.manager import AdapterManager
from engine.adapters.slots import AdapterSlots
from engine.config import EngineConfig
from engine.digest import base_digest
from engine.layers.sampler import invalid_sampling
from engine.memory.blocks import BlockPool
from engine.messages import (
    Done,
    FinishReason,
    FromEngine,
    Generate,
    LoadAdapter,
    Status,
    Tokens,
    UnloadAdapter,
)
from engine.models.registry import read_spec
from engine.runner.build import build_forward
from engine.runner.placement import block_size, choose_device
from engine.runner.runner import Runner, StepOutput
from engine.scheduling.scheduler import Row, Scheduler
from engine.sequence import Sequence

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Engine:
    """Model, cache, scheduler and adapters of one base. `outbox` holds (client, message) pairs to be sent, in order."""

    def __init__(self, config: EngineConfig, wake: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self.epoch = secrets.randbits(52)
        self.outbox: list[tuple[bytes, FromEngine]] = []
        spec = read_spec(config.model)
        size = block_size(choose_device(config))
        pool = BlockPool(config.kv_tokens, size)
        self.max_context = min(config.max_context or spec.max_positions, spec.max_positions, pool.total * size)
        self.forward = build_forward(config, spec, blocks=pool.total, positions=self.max_context)
        self.runner = Runner(self.forward)
        self.scheduler = Scheduler(
            pool, max_running=config.max_running, step_tokens=config.step_tokens, max_context=self.max_context
        )
        self.base = base_digest(config.model)
        reader = AdapterReader(config.artifacts.absolute(), self.base, spec, config.adapter_rank, self.forward.dtype)
        slots = AdapterSlots(self.forward, config.adapter_slots, config.adapter_rank)
        self.adapters = AdapterManager(reader, slots, wake)
        self._sequences: dict[tuple[bytes, str], Sequence] = {}
        self._parked: dict[str, list[Sequence]] = {}
        self._arrivals = count()
        self._born = time.monotonic()
        self._steps = 0
        self._generated = 0

    @property
    def busy(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, client: bytes, request: Generate) -> None:
        """Take a request in, or answer at once why not."""
        limit = min(len(request.prompt) + request.sampling.max_tokens, self.max_context)
        sequence = Sequence(client, request, next(self._arrivals), limit)
        refusal = self._refusal(client, request)
        if refusal is not None:
            self.outbox.append((client, sequence.ending(self.epoch, "error", *refusal)))
            return
        self._sequences[client, request.id] = sequence
        if request.adapter is not None and self.adapters.loading(request.adapter):
            self._parked.setdefault(request.adapter, []).append(sequence)
        else:
            self._start(sequence)

    def cancel(self, client: bytes, request_id: str) -> None:
        """End a request whose client has read enough; unknown ids finished first."""
        sequence = self._sequences.get((client, request_id))
        if sequence is not None:
            self._end(sequence, "cancelled")

    def cancel_client(self, client: bytes) -> None:
        """End everything a vanished client was waiting for; nothing more is sent to it."""
        for sequence in [sequence for sequence in self._sequences.values() if sequence.client == client]:
            self._end(sequence, "cancelled")
        self.outbox = [(receiver, message) for receiver, message in self.outbox if receiver != client]

    def load_adapter(self, client: bytes, message: LoadAdapter) -> None:
        """Answered with Done when the adapter serves, or why it does not."""
        self.adapters.load(message.digest, message.path, self._answer(client, message.id))

    def unload_adapter(self, client: bytes, message: UnloadAdapter) -> None:
        """Answered with Done when the slot is free."""
        self.adapters.unload(message.digest, self._answer(client, message.id))

    def step(self) -> bool:
        """Settle adapters, then compute one batch. False when there was nothing to compute."""
        for digest in self.adapters.settle():
            for sequence in self._parked.pop(digest, []):
                self._start(sequence)
        rows = self.scheduler.schedule()
        if not rows:
            return False
        self._mark_started(rows)
        try:
            self._apply(self.runner.step(rows))
        except Exception as error:
            # A step that fails must not take the engine down: its rows get an answer, the others go on.
            traceback.print_exc(file=sys.stderr)
            for row in rows:
                self._end(row.sequence, "error", "internal", f"the step failed: {type(error).__name__}: {error}")
        self._steps += 1
        return True

    def status(self, request_id: str) -> Status:
        """What the engine is and does now."""
        pool = self.scheduler.pool
        return Status(
            epoch=self.epoch,
            id=request_id,
            base=self.base,
            model=str(self.config.model),
            dtype=self.config.precision if self.config.precision == "int8" else DTYPE_NAMES[self.forward.dtype],
            device=self.forward.device.type,
            kernels=self.forward.kernels,
            threads=torch.get_num_threads(),
            max_context=self.max_context,
            running=len(self.scheduler.running),
            waiting=len(self._sequences) - len(self.scheduler.running),
            blocks_total=pool.total,
            blocks_free=pool.free,
            slots=self.adapters.table(),
            slots_total=self.adapters.slots.total,
            steps=self._steps,
            generated_tokens=self._generated,
            uptime_seconds=time.monotonic() - self._born,
            pid=os.getpid(),
            labels=list(self.forward.spec.labels),
        )

    def close(self) -> None:
        """Stop the adapter thread. What is in flight is simply gone: the epoch tells clients."""
        self.adapters.close()
        self.forward.close()

    def _refusal(self, client: bytes, request: Generate) -> tuple[str, str] | None:
        """Code and sentence when a request cannot be taken."""
        if (client, request.id) in self._sequences:
            return "invalid_request", f"request id {request.id!r} is already in flight"
        if len(self._sequences) >= self.config.max_waiting:
            return "overloaded", f"{len(self._sequences)} requests are in flight already; try again later"
        if self.forward.spec.labels:
            return "unsupported", "this model classifies and has no language-model head; ask it for classes"
        if not request.prompt:
            return "invalid_request", "the prompt is empty"
        if len(request.prompt) >= self.max_context:
            length = len(request.prompt)
            return (
                "prompt_too_long",
                f"the prompt has {length} tokens; the context holds {self.max_context} with the answer",
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self.forward.spec.vocab_size:
            return "invalid_request", f"token ids must lie between 0 and {self.forward.spec.vocab_size - 1}"
        if reason := invalid_sampling(request.sampling, self.forward.spec.vocab_size):
            return "invalid_request", reason
        if not self._servable(request.adapter):
            return "adapter_not_loaded", f"adapter {request.adapter} is not loaded"
        return None

    def _servable(self, adapter: str | None) -> bool:
        return adapter is None or self.adapters.slots.ready(adapter) or self.adapters.loading(adapter)

    def _start(self, sequence: Sequence) -> None:
        """Take the adapter's reference and queue the sequence; an adapter that failed to load ends it."""
        adapter = sequence.request.adapter
        if adapter is not None:
            if not self.adapters.slots.ready(adapter):
                self._end(sequence, "error", "adapter_not_loaded", f"adapter {adapter} could not be loaded")
                return
            sequence.slot = self.adapters.slots.acquire(adapter)
        self.scheduler.add(sequence)

    def _mark_started(self, rows: list[Row]) -> None:
        now = time.perf_counter()
        for sequence, _ in rows:
            if sequence.started is None:
                sequence.started = now

    def _apply(self, output: StepOutput) -> None:
        """Account for what was computed and hand out the new tokens."""
        drawn = [row.sequence for row in output.rows if row.samples]
        for row in output.rows:
            row.sequence.computed += row.length
        self._generated += len(drawn)
        for sequence, token, logprob, top, fault in zip(drawn, *output.sampled, strict=True):
            if fault is not None:
                self._end(sequence, "error", fault.code, fault.reason)
                continue
            reason = sequence.accept(token, logprob)
            ranked = [top] if sequence.request.sampling.top_logprobs else []
            message = Tokens(
                epoch=self.epoch, id=sequence.request.id, token_ids=[token], logprobs=[logprob], top=ranked
            )
            self.outbox.append((sequence.client, message))
            if reason is not None:
                self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason, code: str = "", error: str | None = None) -> None:
        """The one ending: release everything, say Finished. A second call does nothing."""
        if sequence.ended:
            return
        sequence.ended = True
        del self._sequences[sequence.client, sequence.request.id]
        self.scheduler.remove(sequence)
        for parked in self._parked.values():
            if sequence in parked:
                parked.remove(sequence)
        if sequence.slot and sequence.request.adapter is not None:
            self.adapters.slots.release(sequence.request.adapter)
        self.outbox.append((sequence.client, sequence.ending(self.epoch, reason, code, error)))

    def _answer(self, client: bytes, request_id: str) -> Callable[[str], None]:
        return lambda error: self.outbox.append((client, Done(epoch=self.epoch, id=request_id, error=error)))
