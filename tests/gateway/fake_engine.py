"""A fast stand-in for the engine: speaks its messages, computes nothing.

`python -m tests.gateway.fake_engine SOCKET [--step-ms N] [--context N] [--stamp]`. Token `i` of a request is a visible
one that depends on seed, choice and `i` alone. An adapter loads when its directory holds `adapter.ok`. With `--stamp`
the log-probability of a token is the monotonic time it was sent. Ends with its parent.
"""

import argparse
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from engine.messages import (
    Cancel,
    Done,
    Finished,
    Forget,
    Generate,
    GetStatus,
    LoadAdapter,
    Slot,
    Status,
    Tokens,
    UnloadAdapter,
    decode_to_engine,
    encode,
)  # fmt: skip

FIRST_VISIBLE, VISIBLE = 5, 26


@dataclass
class Running:
    client: bytes
    message: Generate
    produced: int = 0


@dataclass
class FakeEngine:
    socket: zmq.Socket[bytes]
    step_seconds: float
    context: int
    stamp: bool = False
    epoch: int = field(default_factory=lambda: secrets.randbits(60))
    loaded: set[str] = field(default_factory=set)
    running: dict[str, Running] = field(default_factory=dict)
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
        elif isinstance(message, Cancel):
            self.running.pop(message.id, None)
        elif isinstance(message, LoadAdapter):
            whole = (Path(message.path) / "adapter.ok").exists()
            # One whose slot another takes at once is loaded in vain.
            if whole and not (Path(message.path) / "slot.lost").exists():
                self.loaded.add(message.digest)
            error = "" if whole else "adapter.ok is missing"
            self._send(client, Done(epoch=self.epoch, id=message.id, error=error))
        elif isinstance(message, UnloadAdapter | Forget):
            self._send(client, Done(epoch=self.epoch, id=message.id))
        elif isinstance(message, GetStatus):
            self._send(client, self._status(message.id))

    def _admit(self, client: bytes, message: Generate) -> None:
        if message.adapter is not None and message.adapter not in self.loaded:
            error = f"adapter {message.adapter} is not loaded"
            self._send(client, self._finished(message, "error", 0, error, "adapter_not_loaded"))
        else:
            self.running[message.id] = Running(client, message)

    def _step(self) -> None:
        self.steps += 1
        replies: dict[bytes, list[bytes]] = {}
        for request_id, run in list(self.running.items()):
            frames = replies.setdefault(run.client, [])
            token = FIRST_VISIBLE + (run.message.sampling.seed + 7 * run.message.choice + run.produced) % VISIBLE
            logprob = time.monotonic() if self.stamp else -0.25
            run.produced += 1
            self.generated += 1
            frames.append(encode(Tokens(epoch=self.epoch, id=request_id, token_ids=[token], logprobs=[logprob])))
            if run.produced >= run.message.sampling.max_tokens:
                frames.append(encode(self._finished(run.message, "length", run.produced)))
                del self.running[request_id]
        for client, frames in replies.items():
            self.socket.send_multipart([client, *frames])

    def _finished(self, message: Generate, reason: str, count: int, error: str = "", code: str = "") -> Finished:
        return Finished(
            epoch=self.epoch, id=message.id, reason=reason, adapter=message.adapter, error=error or None,
            code=code, prompt_tokens=len(message.prompt), completion_tokens=count,
        )  # type: ignore[arg-type]  # fmt: skip

    def _status(self, request_id: str) -> Status:
        slots = [
            Slot(index=index + 1, digest=digest, state="ready", references=0)
            for index, digest in enumerate(sorted(self.loaded))
        ]
        return Status(
            epoch=self.epoch, id=request_id, base="ba5e" * 16, model="fake", dtype="none", device="none", threads=1,
            max_context=self.context, running=len(self.running), waiting=0, blocks_total=100, blocks_free=100,
            slots=slots, slots_total=8, steps=self.steps, generated_tokens=self.generated, uptime_seconds=0.0,
            pid=os.getpid(),
        )  # fmt: skip

    def _send(self, client: bytes, message: Done | Finished | Status) -> None:
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
