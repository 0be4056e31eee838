"""Parts are restarted, stopped in order, and never left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.errors import Conflict, Unavailable
from services.platform import lock
from services.platform.process import Part
from services.platform.supervisor import Supervisor
from tests.platform.conftest import MakePart, alive, pids_of, wait_until


class Watched:
    """A supervisor watching in a thread, as `whet up` does in its main one."""

    def __init__(self, directory: Path) -> None:
        self.said: list[str] = []
        self.stop = threading.Event()
        self.supervisor = Supervisor(directory, directory / "state.json", self.said.append)
        self._thread = threading.Thread(target=self.supervisor.watch, args=(self.stop,))

    def run(self, *parts: Part) -> None:
        for part in parts:
            self.supervisor.start(part)
        self.supervisor.wait_ready([part.name for part in parts], lambda _: None, self.stop)
        self._thread.start()

    def close(self) -> None:
        self.stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.supervisor.shut_down()


@contextmanager
def watched(directory: Path) -> Iterator[Watched]:
    made = Watched(directory)
    try:
        yield made
    finally:
        made.close()


def test_a_part_that_dies_is_restarted_and_its_neighbour_is_not(make_part: MakePart, tmp_path: Path) -> None:
    with watched(tmp_path) as platform:
        platform.run(make_part("dying"), make_part("steady"))
        before, steady = pids_of(tmp_path, "dying")[0], pids_of(tmp_path, "steady")[0]
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: (tmp_path / "dying").exists() and pids_of(tmp_path, "dying")[0] != before)
        assert alive(pids_of(tmp_path, "dying")[0])
        assert pids_of(tmp_path, "steady")[0] == steady
        assert "dying was killed by signal 9; restarting in 0.5 s" in platform.said[0]
        state = json.loads((tmp_path / "state.json").read_text())
        assert {name: part["restarts"] for name, part in state["parts"].items()} == {"dying": 1, "steady": 0}


def test_the_pause_before_a_restart_grows(tmp_path: Path) -> None:
    with watched(tmp_path) as platform:
        platform.run(
            Part("hopeless", (sys.executable, "-S", "-c", "import time; time.sleep(0.2); raise SystemExit(7)"))
        )
        wait_until(lambda: len(platform.said) == 3)
    pauses = [said.partition("restarting in ")[2].split()[0] for said in platform.said[:3]]
    assert pauses == ["0.5", "1", "2"]
    assert all("ended with exit code 7" in said for said in platform.said[:3])


def test_parts_stop_from_the_outside_in(tmp_path: Path) -> None:
    order = tmp_path / "order"
    script = (
        "import signal, sys, time\n"
        "def stop(*_):\n    time.sleep(float(sys.argv[2])); open(sys.argv[3], 'a').write(sys.argv[1]); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\nopen(sys.argv[4], 'w').close()\ntime.sleep(60)"
    )
    parts = [
        Part(
            name, (sys.executable, "-S", "-c", script, name, pause, str(order), str(tmp_path / name)),
            stage=stage, ready=(tmp_path / name).exists,
        )
        for name, stage, pause in (("a", 0, "0"), ("b", 1, "0.1"), ("c", 2, "0.3"))
    ]  # fmt: skip
    with watched(tmp_path) as platform:
        platform.run(*parts)
    assert order.read_text() == "cba"


def test_a_part_that_cannot_start_stops_the_start_with_its_last_words(tmp_path: Path) -> None:
    broken = Part("broken", (sys.executable, "-S", "-c", "raise SystemExit('port taken')"), ready=lambda: False)
    with watched(tmp_path) as platform, pytest.raises(Unavailable, match="port taken"):
        platform.run(broken)


@pytest.fixture
def nursery(home: Path) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-m", "tests.platform.nursery", str(home)])
    try:
        wait_until((home / "ready").exists)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_supervisor_is_ended(
    nursery: "subprocess.Popen[bytes]", home: Path, number: signal.Signals
) -> None:
    state = json.loads((home / "state.json").read_text())
    pids = [part["guard"] for part in state["parts"].values()] + pids_of(home, "first") + pids_of(home, "second")
    assert len(pids) == 5
    assert all(alive(pid) for pid in pids)
    nursery.send_signal(number)
    nursery.wait(10)
    wait_until(lambda: not any(alive(pid) for pid in pids))
    # The lock is free, so the next start is not refused.
    os.close(lock.take(home, patience=2))


def test_a_second_platform_in_the_same_home_is_refused(nursery: "subprocess.Popen[bytes]", home: Path) -> None:
    with pytest.raises(Conflict, match=rf"already runs in {home} \(process {nursery.pid}\)"):
        lock.take(home)
    assert lock.held(home)


def test_a_lock_file_left_by_a_crash_is_no_lock(home: Path) -> None:
    (home / lock.LOCK).write_text(str(os.getpid()))
    assert not lock.held(home)
    os.close(lock.take(home, patience=0))
