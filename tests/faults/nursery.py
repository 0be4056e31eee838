"""Starts processes by forking itself with everything imported already: a restart costs milliseconds, not a second.

Reads one JSON order a line on stdin and answers with the child's process id; when stdin closes it kills its children.
The children run the same `main` as `python -m` would.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from tests.gateway.parts import World

MODULES = ("services.gateway.main", "services.gateway.log_shipper")


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    children: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            run(order)
        children.add(child)
        print(child, flush=True)
    for child in children:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def run(order: dict[str, str]) -> None:
    """Become the process; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(json.loads(order["environment"]))
    status = 1
    try:
        importlib.import_module(order["module"]).main()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def alive(pid: int) -> bool:
    """Whether the process is there: the kernel reaps the nursery's children at once."""
    return Path(f"/proc/{pid}").exists()


class Nursery:
    """The tests' side of it; one serves them all."""

    def __init__(self) -> None:
        self._children: dict[Path, list[int]] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def start(self, world: World, module: str, **environment: str) -> int:
        """Process id of a new child running `module`'s main in a world."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        log = str(world.settings.home / "logs" / f"{module.rpartition('.')[2]}.log")
        order = {"module": module, "log": log, "environment": json.dumps(world.environment | environment)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self._children.setdefault(world.settings.home, []).append(pid)
        return pid

    def children_of(self, world: World) -> list[int]:
        """Process ids of everything started in a world."""
        return self._children.get(world.settings.home, [])


def kill(pid: int) -> None:
    """kill -9, of a process this test started; returns when it is gone, its port and locks with it."""
    if alive(pid):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < deadline, f"{pid} does not die"
        time.sleep(0.001)


if __name__ == "__main__":
    main()
