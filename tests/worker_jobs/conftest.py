"""A real worker process with test handlers, and a dispatcher in a thread of the test."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.settings import Settings
from worker.dispatcher import Dispatcher

ROOT = Path(__file__).parents[2]


def eventually(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is true; fail when it does not become true."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.05)


class Process:
    """A process of ours in its own session, so that everything it started can be ended with it."""

    def __init__(self, module: str, log: Path, **environment: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def said(self, words: str) -> bool:
        """Whether these words are in its log."""
        return words in self.log.read_text(errors="replace")

    def kill_all(self) -> None:
        """SIGKILL it and every process of its session."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., Process]]:
    """Start `python -m module` with the test's settings; whatever still runs at the end is killed."""
    started: list[Process] = []

    def start(module: str, **environment: str) -> Process:
        started.append(Process(module, home / "logs" / f"{len(started)}.log", **environment))
        return started[-1]

    (home / "logs").mkdir(exist_ok=True)
    yield start
    for process in started:
        process.kill_all()


@pytest.fixture
def dispatcher(settings: Settings) -> Iterator[Dispatcher]:
    """A leading dispatcher that rings again after half a second."""
    made = Dispatcher(settings, republish_seconds=0.5, patience_seconds=0.0)
    thread = threading.Thread(target=made.run, name="dispatcher")
    thread.start()
    yield made
    made.stop()
    thread.join(15)
    assert not thread.is_alive(), "the dispatcher did not stop"
