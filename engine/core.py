"""The engine itself, without a process around it: requests in, messages out, one step at a time.

Every request that enters gets exactly one ending; blocks, slots and references are released in `_close` and
nowhere else. Not thread-safe: one thread submits, steps and empties the outbox.
"""

import math
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch

from engine.adapters.loading import AdapterReader
from engine.adapters.manager import AdapterManager
from engine.adapters.slots import AdapterSlots
from engine.config import EngineConfig
from engine.digest import base_digest
from engine.grammar.workshop import GrammarWorkshop
from engine.layers.sampler import Fault
from engine.memory.blocks import BlockPool
from engine.memory.prefix import PrefixCache
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
    LoadCode,
    LoadSpeculator,
    Pool,
    Pooled,
    PromptLogprobs,
    Status,
    Tokens,
    UnloadAdapter,
    UnloadSpeculator,
)
from engine.models.registry import read_spec
from engine.runner.build import build_forward
from engine.runner.placement import block_size, choose_device
from engine.runner.pooling import Pooler, readable, vector_bytes
from engine.runner.runner import Runner, StepOutput
from engine.runner.sampling import NOT_FINITE, accepted, complete
from engine.scheduling.admission import Admission, Refusal
from engine.scheduling.deadlines import Deadlines
from engine.scheduling.parking import Parking
from engine.scheduling.scheduler import Row, Scheduler
from engine.sequence import Sequence, as_generate
from engine.speculation.drafting import make_drafting
from engine.speculation.manager import LoadAnswer
from engine.speculation.verify import Verified, verify

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Engine:
    """Model, cache, scheduler and adapters of one base. `outbox` holds (client, message) pairs to be sent, in order."""

    def __init__(self, config: EngineConfig, wake: Callable[[], None] = lambda: None) -> None:
        spec = read_spec(config.model)
        if spec.labels:
            # A classifier says nothing: there is nothing to draft, and no LM head to measure steps with.
            config = replace(config, speculation=False)
        self.config = config
        self.epoch = secrets.randbits(52)
        self.outbox: list[tuple[bytes, FromEngine]] = []
        size = block_size(choose_device(config))
        pool = BlockPool(config.kv_tokens, size)
        self.max_context = min(config.max_context or spec.max_positions, spec.max_positions, pool.total * size)
        self.forward = build_forward(config, spec, blocks=pool.total, positions=self.max_context)
        self.runner = Runner(self.forward, native=config.native)
        self.base = base_digest(config.model)
        self.scheduler = Scheduler(
            pool,
            max_running=config.max_running,
            step_tokens=config.step_tokens,
            max_context=self.max_context,
            prefix=PrefixCache(pool, self.base, self._precision) if config.prefix_cache else None,
        )
        reader = AdapterReader(config.artifacts.absolute(), self.base, spec, config.adapter_rank, self.forward.dtype)
        slots = AdapterSlots(self.forward, config.adapter_slots, config.adapter_rank)
        self.adapters = AdapterManager(reader, slots, wake)
        self.drafting = make_drafting(config, self.runner, self.scheduler, self.base, self.max_context, wake)
        self.admission = Admission(config, spec, self.max_context)
        self._grammars = GrammarWorkshop(config.model, spec.vocab_size, wake)
        self._deadlines = Deadlines()
        self._parking = Parking()
        self._sequences: dict[tuple[bytes, str], Sequence] = {}
        self._arrivals = count()
        self._born = time.monotonic()
        self._steps = 0
        self._generated = 0

    @property
    def busy(self) -> bool:
        """Whether a step has something to do: to compute, or to settle what the last request to end made possible."""
        return (
            bool(self.scheduler.running or self.scheduler.waiting) or self.adapters.restless or self.drafting.restless
        )

    @property
    def in_flight(self) -> int:
        """Requests without their ending, those that wait for a grammar or an adapter included."""
        return len(self._sequences)

    @property
    def patience_seconds(self) -> float | None:
        """How long an idle engine may sleep before a request's deadline passes; None when there is none."""
        return None if self._deadlines.next is None else max(0.0, self._deadlines.next - time.perf_counter())

    def submit(self, client: bytes, request: Generate) -> None:
        """Take a request for tokens in, or answer at once why not."""
        limit = min(len(request.prompt) + request.sampling.max_tokens, self.max_context)
        self._take(Sequence(client, request, next(self._arrivals), limit))

    def submit_pool(self, client: bytes, request: Pool) -> None:
        """Take a request for a vector in, or answer at once why not. It is scheduled like one for tokens."""
        read = as_generate(request, readable(request, self.forward.spec.pad_token))
        self._take(Sequence(client, read, next(self._arrivals), len(read.prompt) + 1, pool=request))

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

    def forget(self, client: bytes, message: Forget) -> None:
        """Drop what is kept of a namespace, and keep nothing of its requests in flight; answered with Done."""
        for sequence in self._sequences.values():
            sequence.learns = sequence.learns and sequence.request.namespace != message.namespace
        if self.scheduler.prefix is not None:
            self.scheduler.prefix.forget(message.namespace)
        self.drafting.forget(message.namespace)
        self.outbox.append((client, Done(epoch=self.epoch, id=message.id)))

    def load_adapter(self, client: bytes, message: LoadAdapter) -> None:
        """Answered with Done when the adapter serves, or why it does not."""
        self.adapters.load(message.digest, message.path, self._answer(client, message.id))

    def unload_adapter(self, client: bytes, message: UnloadAdapter) -> None:
        """Answered with Done when the slot is free."""
        self.adapters.unload(message.digest, self._answer(client, message.id))

    def load_speculator(self, client: bytes, message: LoadSpeculator) -> None:
        """Answered with Done when the heads draft, or why they do not."""
        answer = self._answer(client, message.id)
        if not self.config.speculation:
            answer("this engine drafts nothing: it runs with --no-speculation, or its model generates no text")
            return
        self.drafting.speculators.load(message.digest, message.path, message.replaces, answer)

    def unload_speculator(self, client: bytes, message: UnloadSpeculator) -> None:
        """Answered with Done; nothing drafts with it from the next step on."""
        self.drafting.speculators.unload(message.digest, self._answer(client, message.id))

    def learn(self, client: bytes, message: Learn) -> None:
        """Past responses join a namespace's suffix corpus; answered with Done when all have."""
        answer, size = self._answer(client, message.id), self.forward.spec.vocab_size
        if any(response and not 0 <= min(response) <= max(response) < size for response in message.responses):
            answer(f"token ids must lie between 0 and {size - 1}: these were said by another model")
        else:
            self.drafting.study(message.namespace, message.responses if self.config.speculation else [], answer)

    def step(self) -> bool:
        """Let in who need not wait any more, then compute one batch. False when there was nothing to compute."""
        rows: list[Row] = []
        try:
            self._settle()
            began = time.perf_counter()
            rows = self.scheduler.schedule()
            if not rows:
                return False
            rows = self.drafting.plan(rows, self.config.step_tokens)
            self._prepare()
            self._apply(self.runner.step(rows))
            self.drafting.timed(time.perf_counter() - began)
        except Exception as error:
            # A step that fails must not take the engine down: its rows get an answer, the others go on. When it failed
            # before there were rows nobody knows who is to blame, and the next step would fail like it: all end.
            traceback.print_exc(file=sys.stderr)
            for sequence in [row.sequence for row in rows] or list(self._sequences.values()):
                self._end(sequence, "error", "internal", f"the step failed: {type(error).__name__}: {error}")
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
            dtype=self._precision,
            device=self.forward.device.type,
            kernels=self.forward.kernels,
            threads=self.forward.threads,
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
            speculators=self.drafting.speculators.table(),
            speculators_total=self.drafting.speculators.total if self.config.speculation else 0,
            corpora=self.drafting.corpora.status(),
            corpus_capacity=self.drafting.corpora.capacity if self.config.speculation else 0,
            costs=self.drafting.costs.report() if self.config.speculation else [],
        )

    def close(self) -> None:
        """Stop the threads. What is in flight is simply gone: the epoch tells clients."""
        self.adapters.close()
        self.drafting.close()
        self._grammars.close()
        self.forward.close()

    @property
    def _precision(self) -> str:
        return self.config.precision if self.config.precision == "int8" else DTYPE_NAMES[self.forward.dtype]

    def _take(self, sequence: Sequence) -> None:
        """Answer why not, or hold the request until it has exactly one ending."""
        refusal = self._refusal(sequence)
        if refusal is not None:
            self.outbox.append((sequence.client, sequence.ending(self.epoch, "error", *refusal)))
            return
        request = sequence.request
        self._sequences[sequence.client, request.id] = sequence
        self.admission.enter(sequence)
        self._deadlines.enter(sequence)
        if request.grammar is not None:
            self._grammars.order(sequence, request.grammar)
        else:
            self._place(sequence)

    def _refusal(self, sequence: Sequence) -> Refusal | None:
        request = sequence.request
        if (sequence.client, request.id) in self._sequences:
            return Refusal("invalid_request", f"request id {request.id!r} is already in flight")
        refusal = self.admission.refusal(request, sequence.pool)
        if refusal is not None:
            return refusal
        adapter = request.adapter
        if adapter is None or self.adapters.slots.ready(adapter) or self.adapters.loading(adapter):
            return None
        return Refusal("adapter_not_loaded", f"adapter {adapter} is not loaded")

    def _settle(self) -> None:
        """Between two steps: start who waited for a grammar or an adapter, end who waited too long."""
        for sequence, matcher, refusal, failure in self._grammars.finished():
            sequence.grammar = matcher
            if matcher is not None:
                self._place(sequence)
            else:
                self._end(sequence, "error", "invalid_request" if refusal else "internal", refusal or failure)
        for digest in self.adapters.settle():
            for sequence in self._parking.release(digest):
                self._start(sequence)
        self.drafting.prepare()
        if self._deadlines.next is not None:
            for sequence in self._deadlines.due(time.perf_counter()):
                self._end(sequence, "error", "deadline", "the request's deadline passed before it was finished")

    def _place(self, sequence: Sequence) -> None:
        """Start a sequence, or park it while its adapter is being loaded."""
        adapter = sequence.request.adapter
        if adapter is not None and self.adapters.loading(adapter):
            self._parking.enter(adapter, sequence)
        else:
            self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        """Take the adapter's reference and queue the sequence; an adapter that failed to load ends it."""
        adapter = sequence.request.adapter
        if adapter is not None:
            if not self.adapters.slots.ready(adapter):
                self._end(sequence, "error", "adapter_not_loaded", f"adapter {adapter} could not be loaded")
                return
            sequence.slot = self.adapters.slots.acquire(adapter)
        if sequence.pool is not None:
            length = len(sequence.request.prompt)
            sequence.pooler = Pooler(length, sequence.pool.how, self.forward.score, sequence.slot)
        self.scheduler.add(sequence)

    def _apply(self, output: StepOutput) -> None:
        """Account for what was computed and hand out the new tokens."""
        starts = {sequence: sequence.computed for sequence in (*output.pooled, *output.prompt)}
        verified = self.drafting.choose(verify(output.rows, output.sampled))
        self.scheduler.advance(output.rows)
        for sequence, chunk in output.prompt.items():
            sequence.learn(starts[sequence], chunk.logprobs, chunk.top)
        for each in verified:
            fault = output.sampled.faults[each.first]
            if fault is None and not all(map(math.isfinite, each.row.sequence.scores)):
                fault = NOT_FINITE
            if fault is not None:
                self._fail(each.row.sequence, fault)
            else:
                self._give(each, output)
        self.drafting.remember(verified, output.hidden_RE)
        for sequence, hidden_TE in output.pooled.items():
            self._pool(sequence, hidden_TE, starts[sequence])

    def _prepare(self) -> None:
        """What a block's last holder left must not reach the next one, even through masked places: 0 x NaN is NaN."""
        # Taken out first: after a step that fails here, these blocks are somebody else's.
        fresh, self.scheduler.fresh = self.scheduler.fresh, []
        copies, self.scheduler.copies = self.scheduler.copies, []
        if fresh:
            self.forward.clear(fresh)
        if copies:
            self.forward.copy(copies)

    def _give(self, verified: Verified, output: StepOutput) -> None:
        """Accept the tokens that came out, send them, and end the sequence they complete."""
        sequence = verified.row.sequence
        request = sequence.request
        if request.prompt_logprobs and not sequence.produced:
            scored = PromptLogprobs(epoch=self.epoch, id=request.id, logprobs=sequence.scores, top=sequence.ranked)
            self.outbox.append((sequence.client, scored))
        cached = 0 if sequence.produced else sequence.cached_tokens
        reason, fault, count = self._accept(verified, output)
        taken = slice(verified.first, verified.first + count)
        tokens = output.sampled.token_ids[taken]
        drafts, speculator = self.drafting.settle(verified, tokens)
        self._generated += count
        message = Tokens(
            epoch=self.epoch,
            id=request.id,
            token_ids=tokens,
            logprobs=output.sampled.logprobs[taken],
            top=list(output.sampled.top[taken]) if request.sampling.top_logprobs else [],
            cached_tokens=cached,
            drafts=drafts,
            speculator=speculator,
        )
        self.outbox.append((sequence.client, message))
        self.scheduler.waiting.charge(sequence, count)
        self.scheduler.keep(sequence, min(count, verified.accepted))
        if fault is not None:
            self._fail(sequence, fault)
        elif reason is not None:
            self._end(sequence, reason)

    def _accept(self, verified: Verified, output: StepOutput) -> tuple[FinishReason | None, Fault | None, int]:
        """Take over the tokens in order, as if each had had a step of its own: what ends the sequence, and how many.

        What stands behind a token that ends it is dropped; a later place's fault ends it after the tokens before it.
        """
        sequence, sampled = verified.row.sequence, output.sampled
        for done in range(1 + verified.accepted):
            place = verified.first + done
            fault = sampled.faults[place]
            if fault is not None:
                return None, fault, done
            reason = sequence.accept(sampled.token_ids[place], sampled.logprobs[place])
            accepted(sequence, sampled.token_ids[place])
            if complete(sequence):
                reason = "stop"
            if reason is not None:
                return reason, None, done + 1
        return None, None, 1 + verified.accepted

    def _fail(self, sequence: Sequence, fault: Fault) -> None:
        """End a sequence that has no next token; nobody may find what it computed if that is not finite."""
        if fault is NOT_FINITE:
            self.scheduler.distrust(sequence)
        self._end(sequence, "error", fault.code, fault.reason)

    def _pool(self, sequence: Sequence, hidden_TE: torch.Tensor, start: int) -> None:
        """Take the states of a chunk, and answer after the last one."""
        pooler = sequence.pooler
        assert isinstance(pooler, Pooler), "sequences that pool are started with a pooler"
        pooler.add(hidden_TE, start)
        if not pooler.complete:
            return
        vector_N = pooler.vector()
        if bool(vector_N.isfinite().all()):
            self._close(sequence, sequence.pooled(self.epoch, vector_bytes(vector_N)))
        else:
            self.scheduler.distrust(sequence)
            self._end(sequence, "error", NOT_FINITE.code, "the model's states are not finite")

    def _end(self, sequence: Sequence, reason: FinishReason, code: ErrorCode = "", error: str | None = None) -> None:
        """End a sequence with Finished, if it has not ended."""
        if not sequence.ended:
            self._close(sequence, sequence.ending(self.epoch, reason, code, error))

    def _close(self, sequence: Sequence, ending: Finished | Pooled) -> None:
        """The one ending: release everything, say so."""
        assert not sequence.ended, "a request has one ending"
        sequence.ended = True
        del self._sequences[sequence.client, sequence.request.id]
        self.drafting.end(sequence, learn=isinstance(ending, Finished) and ending.reason != "error")
        self.scheduler.remove(sequence)
        self.admission.leave(sequence)
        self._deadlines.leave(sequence)
        self._grammars.discard(sequence)
        self._parking.leave(sequence)
        if sequence.slot and sequence.request.adapter is not None:
            self.adapters.slots.release(sequence.request.adapter)
        self.outbox.append((sequence.client, ending))

    def _answer(self, client: bytes, request_id: str) -> LoadAnswer:
        def answer(error: str, transient: bool = False, serving: str = "", code: LoadCode = "") -> None:
            done = Done(epoch=self.epoch, id=request_id, error=error, transient=transient, serving=serving, code=code)
            self.outbox.append((client, done))

        return answer
