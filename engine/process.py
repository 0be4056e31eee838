"""The engine's process: one endless loop around `Engine`, spoken to over ZeroMQ.

`python -m engine.process --model DIR --socket ipc://PATH --artifacts DIR`. Prints one JSON line when it serves.
"""

import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from types import FrameType

# Two torch processes that spin while waiting starve each other; this must be set before OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgspec
import psutil
import zmq

from engine.config import EngineConfig, parse
from engine.messages import (
    Cancel,
    Done,
    Finished,
    Forget,
    FromEngine,
    Generate,
    GetStatus,
    Learn,
    LoadAdapter,
    LoadSpeculator,
    Pool,
    ToEngine,
    UnloadAdapter,
    UnloadSpeculator,
    decode_to_engine,
    encode,
)
from engine.start import make_engine

MAX_MESSAGE_BYTES = 64 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEEP_BYTES = -1, -3, 1 << 30
LARGE_BYTES = 1 << 20
IDLE_MILLISECONDS = 60_000
COMMANDS = {"load_adapter", "unload_adapter", "load_speculator", "unload_speculator", "learn", "forget"}


class EngineProcess:
    """Owns the socket and the loop. Everything a client sends is answered; nothing a client sends ends the loop."""

    def __init__(self, config: EngineConfig) -> None:
        self._stopping = False
        self._alarm, self._alarm_writer = socket.socketpair()
        self._alarm.setblocking(False)
        self._alarm_writer.setblocking(False)
        self.engine = make_engine(config, wake=self._wake)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A slow client must not block the step: the engine limits requests, not messages.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.bind(config.socket)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._alarm, zmq.POLLIN)

    def run(self) -> None:
        """Serve until told to stop."""
        while not self._stopping:
            self._wait()
            self._receive()
            self.engine.step()
            self._send()

    def stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Signal handler: finish the step, then leave the loop."""
        self._stopping = True

    def heed_signals(self) -> None:
        """Stop on SIGTERM and SIGINT. The wake-up descriptor ends a poll even when another thread got the signal."""
        signal.set_wakeup_fd(self._alarm_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)

    def close(self) -> None:
        """Release the socket; clients see it close and fail what they had in flight."""
        self.engine.close()
        self._socket.close()
        self._context.term()
        self._alarm.close()
        self._alarm_writer.close()

    def _wait(self) -> None:
        """Sleep while there is nothing to compute; a message, a loaded adapter, a deadline or a signal wakes us."""
        ready = dict(self._poller.poll(0 if self.engine.busy else self._idle_milliseconds()))
        if self._alarm.fileno() in ready:
            self._alarm.recv(4096)

    def _idle_milliseconds(self) -> int:
        patience = self.engine.patience_seconds
        return IDLE_MILLISECONDS if patience is None else math.ceil(min(IDLE_MILLISECONDS, 1000 * patience))

    def _receive(self) -> None:
        while True:
            try:
                client, *frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            for frame in frames:
                self._dispatch(client, frame)

    def _dispatch(self, client: bytes, frame: bytes) -> None:
        try:
            message = decode_to_engine(frame)
        # ValueError covers msgspec's own errors and text that is not UTF-8.
        except (ValueError, RecursionError) as error:
            self.engine.outbox.append((client, self._complaint(frame, str(error))))
            return
        try:
            self._handle(client, message)
        except Exception as error:
            log("request_failed", kind=type(message).__name__, error=f"{type(error).__name__}: {error}")
            self.engine.outbox.append((client, self._complaint(frame, f"{type(error).__name__}: {error}")))

    def _handle(self, client: bytes, message: ToEngine) -> None:
        match message:
            case Generate():
                self.engine.submit(client, message)
            case Pool():
                self.engine.submit_pool(client, message)
            case Cancel():
                self.engine.cancel(client, message.id)
            case LoadAdapter():
                self.engine.load_adapter(client, message)
            case UnloadAdapter():
                self.engine.unload_adapter(client, message)
            case LoadSpeculator():
                self.engine.load_speculator(client, message)
            case UnloadSpeculator():
                self.engine.unload_speculator(client, message)
            case Learn():
                self.engine.learn(client, message)
            case Forget():
                self.engine.forget(client, message)
            case GetStatus():
                self.engine.outbox.append((client, self.engine.status(message.id)))

    def _complaint(self, frame: bytes, error: str) -> FromEngine:
        """An answer to a message that makes no sense, in the shape its sender waits for if that can be told."""
        try:
            loose = msgspec.msgpack.decode(frame)
        except (ValueError, RecursionError):
            loose = None
        fields = loose if isinstance(loose, dict) else {}
        request_id = str(fields.get("id", ""))
        if str(fields.get("type")) in COMMANDS:
            return Done(epoch=self.engine.epoch, id=request_id, error=error)
        return Finished(epoch=self.engine.epoch, id=request_id, reason="error", code="invalid_request", error=error)

    def _send(self) -> None:
        """One multipart message per client; the requests of a client that vanished are cancelled."""
        while self.engine.outbox:
            letters: dict[bytes, list[bytes]] = {}
            for client, message in self.engine.outbox:
                letters.setdefault(client, [client]).append(encode(message))
            self.engine.outbox = []
            for client, frames in letters.items():
                try:
                    self._socket.send_multipart(frames)
                except zmq.ZMQError as error:
                    if error.errno != zmq.EHOSTUNREACH:
                        raise
                    self.engine.cancel_client(client)

    def _wake(self) -> None:
        """Callable from any thread; a full pipe wakes just as well."""
        try:
            self._alarm_writer.send(b"!")
        except BlockingIOError:
            return


def log(event: str, **fields: object) -> None:
    """One JSON line on standard output, if anybody still reads it."""
    with suppress(BrokenPipeError):
        print(json.dumps({"event": event, "part": "engine", "time": time.time(), **fields}), flush=True)


def tune_heap(threshold: int) -> None:
    """Have glibc take blocks above `threshold` bytes from the system and give them back when freed.

    Low while loading, or every dense weight would stay resident beside its packed copy. High while serving: the page
    faults of fresh blocks made sampling 16 rows cost 11 ms where 0.6 ms of arithmetic were needed. Other C libraries
    have no mallopt and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, threshold)
        mallopt(M_MMAP_THRESHOLD, threshold)


def main() -> int:
    """Load, say so, serve until SIGTERM or SIGINT."""
    config = parse()
    os.umask(0o077)
    tune_heap(LARGE_BYTES)
    # The thread that reads adapters may hold the interpreter this long while a step wants to launch its next kernel.
    sys.setswitchinterval(0.0005)
    try:
        process = EngineProcess(config)
    except (ValueError, OSError, RuntimeError, MemoryError, zmq.ZMQError) as error:
        log("engine_failed", error=str(error))
        return 1
    tune_heap(KEEP_BYTES)
    process.heed_signals()
    status = msgspec.to_builtins(process.engine.status("start"))
    kept = ("base", "model", "dtype", "device", "threads", "max_context", "blocks_total", "slots_total", "pid")
    # Importing torch is most of the start, so the clock starts with the process.
    seconds = round(time.time() - psutil.Process().create_time(), 2)
    log("engine_ready", seconds=seconds, **{name: status[name] for name in kept})
    try:
        process.run()
    finally:
        process.close()
    log("engine_stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
