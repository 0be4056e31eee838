"""Failpoints themselves: what a test orders happens once, at the named place, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.store import failpoints
from tests.gateway.parts import eventually

WALK = """
from services.store import failpoints
for name in ("a", "b", "c"):
    failpoints.reach(name)
    print(name, flush=True)
"""


def walk(armed: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WALK], env={"WHET_FAILPOINT": armed, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_without_orders_nothing_happens(tmp_path: Path) -> None:
    assert walk(f"@{tmp_path / 'order'}").communicate(timeout=30)[0].split() == ["a", "b", "c"]


@pytest.mark.parametrize("armed", ["b", "@"])
def test_a_process_dies_at_the_place_that_is_named(tmp_path: Path, armed: str) -> None:
    order = tmp_path / "order"
    order.write_text("b exit")
    process = walk(armed if armed != "@" else f"@{order}")

    assert process.communicate(timeout=30)[0].split() == ["a"]
    assert process.returncode == failpoints.EXIT_STATUS


def test_a_held_process_goes_on_when_it_is_let_go(tmp_path: Path) -> None:
    order, reached = tmp_path / "order", tmp_path / "order.reached"
    order.write_text("b hold")
    process = walk(f"@{order}")
    eventually(reached.exists)
    assert process.poll() is None
    assert not order.exists()

    reached.unlink()

    assert process.communicate(timeout=30)[0].split() == ["a", "b", "c"]
