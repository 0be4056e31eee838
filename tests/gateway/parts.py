"""Starting the gateway's neighbours as processes, the way the supervisor does, and talking to them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.settings import Settings

START_SECONDS = 30.0


class Process:
    """A child process with its stderr in a file. Stopped by its own id only."""

    def __init__(self, module: str, *arguments: str, log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as stream:
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                env=os.environ | (environment or {}),
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> int:
        """kill -9, and wait until it is gone. Returns its exit status."""
        if self.alive:
            self._child.send_signal(signal.SIGKILL)
        return self._child.wait(timeout=10)

    def stop(self) -> None:
        """Ask it to end."""
        if self.alive:
            self._child.terminate()
            try:
                self._child.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.kill()

    def wait(self, seconds: float) -> int:
        """Its exit status, once it has ended by itself."""
        return self._child.wait(timeout=seconds)


def eventually(condition: Callable[[], object], seconds: float = 10.0, every: float = 0.02) -> None:
    """Return once `condition` holds; fail the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {condition}"
        time.sleep(every)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Stack:
    """Engine, gateway and shipper over one home. `environment` is what all of them see."""

    settings: Settings
    environment: dict[str, str]
    home: Path
    port: int
    real_engine: bool = False
    step_ms: float = 1.0

    def __post_init__(self) -> None:
        self.processes: list[Process] = []
        self.gateway: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, module: str, *arguments: str, environment: dict[str, str] | None = None) -> Process:
        log = self.home / "logs" / f"{module.rpartition('.')[2]}.log"
        log.parent.mkdir(exist_ok=True)
        process = Process(module, *arguments, log=log, environment=self.environment | (environment or {}))
        self.processes.append(process)
        return process

    def start_engine(self) -> Process:
        """The real one, or the fake."""
        if not self.real_engine:
            return self.start("tests.gateway.fake_engine", self.settings.engine_socket, f"--step-ms={self.step_ms}")
        options = {"model": self.settings.model_path, "socket": self.settings.engine_socket,
                   "artifacts": self.settings.artifacts, "precision": "fp32", "threads": 1}  # fmt: skip
        return self.start("engine.process", *(f"--{name}={value}" for name, value in options.items()))

    def start_gateway(self, *, wait: bool = True, environment: dict[str, str] | None = None) -> Process:
        self.gateway = self.start("services.gateway.main", environment=environment)
        if wait:
            self.wait_healthy()
        return self.gateway

    def start_shipper(self, environment: dict[str, str] | None = None) -> Process:
        return self.start("services.gateway.log_shipper", environment=environment)

    def wait_healthy(self) -> None:
        gateway = self.gateway
        assert gateway is not None
        eventually(lambda: self._healthy(gateway), START_SECONDS)

    def _healthy(self, gateway: Process) -> bool:
        assert gateway.alive, gateway.log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()


@contextlib.contextmanager
def running(stack: Stack) -> Iterator[Stack]:
    """Engine and gateway up; everything the stack started is gone afterwards."""
    try:
        stack.start_engine()
        stack.start_gateway()
        yield stack
    finally:
        stack.stop()
