"""No part outlives whoever asked for it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from services.errors import Unavailable
from services.platform.process import Guarded, Part
from tests.platform.conftest import MakePart, alive, pids_of, wait_until


def test_a_stopped_part_is_gone(make_part: MakePart, tmp_path: Path) -> None:
    running = Guarded(make_part("one"), tmp_path / "one.log")
    running.wait_ready()
    code = running.stop()
    assert code == 128 + signal.SIGTERM
    assert not alive(pids_of(tmp_path, "one")[0])


def test_a_part_that_ignores_the_signal_is_killed_after_its_grace(make_part: MakePart, tmp_path: Path) -> None:
    running = Guarded(make_part("deaf", "deaf", grace_seconds=0.3), tmp_path / "deaf.log")
    running.wait_ready()
    begun = time.monotonic()
    code = running.stop()
    assert code == 128 + signal.SIGKILL
    assert 0.3 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("ending", ["stopped", "killed"])
def test_children_in_sessions_of_their_own_die_with_the_part(make_part: MakePart, tmp_path: Path, ending: str) -> None:
    running = Guarded(make_part("parent", "parent"), tmp_path / "parent.log")
    running.wait_ready()
    part, child = pids_of(tmp_path, "parent")
    if ending == "killed":
        os.kill(part, signal.SIGKILL)
        wait_until(lambda: running.exit_code() == 128 + signal.SIGKILL)
    running.stop()
    assert not alive(part)
    assert not alive(child)


def test_a_killed_guard_takes_its_part_along(make_part: MakePart, tmp_path: Path) -> None:
    running = Guarded(make_part("one"), tmp_path / "one.log")
    running.wait_ready()
    os.kill(running.pid, signal.SIGKILL)
    wait_until(lambda: not alive(pids_of(tmp_path, "one")[0]))
    running.stop()


def test_a_part_keeps_its_exit_code_and_its_last_words(tmp_path: Path) -> None:
    part = Part("bad", (sys.executable, "-S", "-c", "print('no model here'); raise SystemExit(3)"), ready=lambda: False)
    running = Guarded(part, tmp_path / "bad.log")
    with pytest.raises(Unavailable, match=r"bad ended at its start\nno model here"):
        running.wait_ready()
    assert running.stop() == 3


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    running = Guarded(Part("bad", ("/nowhere/at-all",), ready=lambda: False), tmp_path / "bad.log")
    with pytest.raises(Unavailable, match="cannot start /nowhere/at-all"):
        running.wait_ready()
    running.stop()
