"""A fast stand-in for the engine: speaks its messages, computes nothing.

`python -m tests.gateway.fake_engine SOCKET [--step-ms N] [--context N] [--stamp]`. Token `i` of a request is a visible
one that depends on seed, choice and `i` alone; but what stands in a prompt between the bytes 1 and 2 is said word for
word, and then it stops. A prompt with byte 3 is answered `overloaded`, with byte 4 `internal`, with byte 5 never. With
byte 6, a request that may speculate gets three tokens a step: two of three drafted by suffix, beside two of which heads
(`speculator`, if it names any) had one right. All of a prompt but its last token counts as cached. An adapter loads if
its directory holds `adapter.ok`. With `--stamp` the log-probability of a token is the monotonic time it was sent. Ends
with its parent.
"""

import argparse
import os
import secrets
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from engine.messages import (
    Cancel,
    Corpus,
    Done,
    Draft,
    Finished,
    Forget,
    Generate,
    GetStatus,
    LoadAdapter,
    Pool,
    Pooled,
    PromptLogprobs,
    Slot,
    SpeculatorSlot,
    Status,
    Tokens,
    UnloadAdapter,
    decode_to_engine,
    encode,
)  # fmt: skip
from tests.gateway.tiny_model import make_vocabulary

FIRST_VISIBLE, VISIBLE = 5, 26
VOCABULARY = make_vocabulary()
# As byte-level BPE writes bytes 1 to 5.
SAY, SAID, OVERLOAD, FAIL, HANG, DRAFT = (VOCABULARY[letter] for letter in "āĂăĄąĆ")
MATCHED, LESSER = Draft("suffix", 3, 2), Draft("heads", 2, 1, won=False)
LIKELY = (-0.25, -1.5, -2.5)


@dataclass
class Running:
    client: bytes
    message: Generate
    produced: int = 0
    script: list[int] | None = None
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        prompt = self.message.prompt
        if SAY in prompt and SAID in prompt:
            self.script = prompt[prompt.index(SAY) + 1 : prompt.index(SAID)]

    def token(self) -> int:
        sampling = self.message.sampling
        if self.script is not None:
            return [*self.script, *sampling.stop_token_ids[:1], 0][self.produced]
        return FIRST_VISIBLE + (sampling.seed + 7 * self.message.choice + self.produced) % VISIBLE

    @property
    def drafts(self) -> list[Draft]:
        """What its next step verifies; the first only reads the prompt."""
        if not self.produced or not self.message.speculate or DRAFT not in self.message.prompt:
            return []
        return [MATCHED, LESSER] if self.message.speculator else [MATCHED]

    @property
    def late(self) -> bool:
        seconds = self.message.deadline_seconds
        return seconds > 0 and time.monotonic() - self.began > seconds


@dataclass
class FakeEngine:
    socket: zmq.Socket[bytes]
    step_seconds: float
    context: int
    stamp: bool = False
    epoch: int = field(default_factory=lambda: secrets.randbits(60))
    loaded: set[str] = field(default_factory=set)
    running: dict[str, Running] = field(default_factory=dict)
    # Vectors that are never made.
    held: set[str] = field(default_factory=set)
    steps: int = 0
    generated: int = 0

    def serve(self) -> None:
        parent = os.getppid()
        due = 0.0
        while os.getppid() == parent:
            if self.socket.poll(0 if self.running else 200):
                client, frame = self.socket.recv_multipart()
                self._take(client, frame)
            elif self.running and (left := due - time.monotonic()) > 0:
                # Longer sleeps would keep new requests waiting.
                time.sleep(min(left, 0.001))
            elif self.running:
                due = time.monotonic() + self.step_seconds
                self._step()

    def _take(self, client: bytes, frame: bytes) -> None:
        message = decode_to_engine(frame)
        if isinstance(message, Generate):
            self._admit(client, message)
        elif isinstance(message, Pool):
            self._pool(client, message)
        elif isinstance(message, Cancel):
            self.running.pop(message.id, None)
            self.held.discard(message.id)
        elif isinstance(message, LoadAdapter):
            whole = (Path(message.path) / "adapter.ok").exists()
            # One whose slot another takes at once is loaded in vain.
            if whole and not (Path(message.path) / "slot.lost").exists():
                self.loaded.add(message.digest)
            error = "" if whole else "adapter.ok is missing"
            away = (Path(message.path) / "disk.away").exists()
            self._send(client, Done(epoch=self.epoch, id=message.id, error=error, transient=away))
        elif isinstance(message, UnloadAdapter | Forget):
            self._send(client, Done(epoch=self.epoch, id=message.id))
        elif isinstance(message, GetStatus):
            self._send(client, self._status(message.id))

    def _pool(self, client: bytes, message: Pool) -> None:
        """How often each of eight kinds of token stands in the prompt; as a score, the prompt's length over ten."""
        if message.adapter is not None and message.adapter not in self.loaded:
            error = f"adapter {message.adapter} is not loaded"
            self._send(client, self._finished(message, "error", 0, error, "adapter_not_loaded"))
            return
        if HANG in message.prompt:
            self.held.add(message.id)
            return
        counts = [float(sum(token % 8 == kind for token in message.prompt)) for kind in range(8)]
        vector = [len(message.prompt) / 10] if message.how == "classify" else counts
        packed = struct.pack(f"<{len(vector)}f", *vector)
        self._send(client, Pooled(epoch=self.epoch, id=message.id, vector=packed, prompt_tokens=len(message.prompt)))

    def _admit(self, client: bytes, message: Generate) -> None:
        if message.adapter is not None and message.adapter not in self.loaded:
            error = f"adapter {message.adapter} is not loaded"
            self._send(client, self._finished(message, "error", 0, error, "adapter_not_loaded"))
        elif OVERLOAD in message.prompt:
            self._send(client, self._finished(message, "error", 0, "too much", "overloaded", retry_after=6.5))
        elif FAIL in message.prompt:
            self._send(client, self._finished(message, "error", 0, "broken", "internal"))
        elif message.grammar is not None and message.grammar.text == "(":
            self._send(client, self._finished(message, "error", 0, "unclosed group", "invalid_request"))
        else:
            self.running[message.id] = Running(client, message)

    def _step(self) -> None:
        self.steps += 1
        replies: dict[bytes, list[bytes]] = {}
        for request_id, run in list(self.running.items()):
            frames = replies.setdefault(run.client, [])
            if run.late:
                frames.append(encode(self._finished(run.message, "error", run.produced, "too late", "deadline")))
                del self.running[request_id]
            elif HANG not in run.message.prompt:
                self._speak(run, frames)
        for client, frames in replies.items():
            if frames:
                self.socket.send_multipart([client, *frames])

    def _speak(self, run: Running, frames: list[bytes]) -> None:
        message, sampling = run.message, run.message.sampling
        if message.prompt_logprobs and not run.produced:
            count = len(message.prompt) - 1
            likely = [self._likely(token, sampling.top_logprobs) for token in message.prompt[1:]]
            frames.append(encode(PromptLogprobs(epoch=self.epoch, id=message.id, logprobs=[-0.5] * count, top=likely)))
        logprob = time.monotonic() if self.stamp else LIKELY[0]
        cached = 0 if run.produced else len(message.prompt) - 1
        drafts, tokens, ends = run.drafts, [], False
        while len(tokens) <= (MATCHED.accepted if drafts else 0) and run.produced < sampling.max_tokens and not ends:
            tokens.append(run.token())
            run.produced += 1
            ends = run.script is not None and tokens[-1] in sampling.stop_token_ids
        self.generated += len(tokens)
        likely = [self._likely(token, sampling.top_logprobs) for token in tokens]
        said = Tokens(
            epoch=self.epoch, id=message.id, token_ids=tokens, logprobs=[logprob] * len(tokens), top=likely,
            cached_tokens=cached, drafts=drafts, speculator=message.speculator or "" if LESSER in drafts else "",
        )  # fmt: skip
        frames.append(encode(said))
        if ends or run.produced >= sampling.max_tokens:
            frames.append(encode(self._finished(message, "stop" if ends else "length", run.produced)))
            del self.running[message.id]

    def _likely(self, token: int, count: int) -> list[tuple[int, float]]:
        return [((token + place) % len(VOCABULARY), value) for place, value in enumerate(LIKELY[:count])]

    def _finished(
        self,
        message: Generate | Pool,
        reason: str,
        count: int,
        error: str = "",
        code: str = "",
        retry_after: float = 0.0,
    ) -> Finished:
        return Finished(
            epoch=self.epoch, id=message.id, reason=reason, adapter=message.adapter, error=error or None,
            code=code, retry_after_seconds=retry_after, prompt_tokens=len(message.prompt), completion_tokens=count,
            cached_tokens=len(message.prompt) - 1 if count else 0,
        )  # type: ignore[arg-type]  # fmt: skip

    def _status(self, request_id: str) -> Status:
        slots = [
            Slot(index=index + 1, digest=digest, state="ready", references=0)
            for index, digest in enumerate(sorted(self.loaded))
        ]
        return Status(
            epoch=self.epoch, id=request_id, base="ba5e" * 16, model="fake", dtype="none", device="none", threads=1,
            max_context=self.context, running=len(self.running) + len(self.held), waiting=0, blocks_total=100,
            blocks_free=100, slots=slots, slots_total=8, steps=self.steps, generated_tokens=self.generated,
            uptime_seconds=0.0, pid=os.getpid(), labels=["relevant"],
            speculators=[SpeculatorSlot(index=1, digest="5bec" * 16, adapter=None, heads=4)], speculators_total=4,
            corpora=[Corpus(namespace="a", tokens=300, bytes=9000), Corpus(namespace="b", tokens=20, bytes=1000)],
        )  # fmt: skip

    def _send(self, client: bytes, message: Done | Finished | Pooled | Status) -> None:
        self.socket.send_multipart([client, encode(message)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stamp", action="store_true")
    options = parser.parse_args()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(options.socket)
    FakeEngine(socket, options.step_ms / 1000, options.context, options.stamp).serve()


if __name__ == "__main__":
    main()
