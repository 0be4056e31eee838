"""Small real processes for the supervisor, and a way to see that they are gone."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.platform.process import Part

# Says who it is, then sleeps; "deaf" ones ignore the stop signal, "parents" leave a child in a session of its own.
SLEEPER = """
import os, signal, subprocess, sys, time
kind, file = sys.argv[1:]
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = [os.getpid()]
if kind == "parent":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    pids.append(child.pid)
with open(file + ".draft", "w") as out:
    out.write(" ".join(map(str, pids)))
os.replace(file + ".draft", file)
time.sleep(60)
"""
MakePart = Callable[..., Part]


@pytest.fixture
def make_part(tmp_path: Path) -> MakePart:
    """A sleeping part; ready once it has written its process ids to `<tmp>/<name>`."""

    def make(name: str, kind: str = "plain", **options: object) -> Part:
        file = tmp_path / name
        command = (sys.executable, "-S", "-c", SLEEPER, kind, str(file))
        return Part(name, command, ready=file.exists, prepare=lambda: file.unlink(missing_ok=True), **options)  # type: ignore[arg-type]

    return make


def pids_of(tmp_path: Path, name: str) -> list[int]:
    """The process ids a ready sleeper wrote."""
    return [int(pid) for pid in (tmp_path / name).read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once it holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def as_root() -> None:
    """For what only happens to root."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the servers then run under another account")
