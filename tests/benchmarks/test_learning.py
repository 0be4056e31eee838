"""The driver of the learning table, and that the simulated candidates are what they claim to be."""

import numpy as np
import pytest

from benchmarks import learning
from benchmarks.learning_cells import Cell
from benchmarks.learning_gate import CELLS, WORLDS, World, ever_promoted, null_candidates, pairs


def cell(_scale: float) -> Cell:
    return Cell("what", "goal", "measured", False, {})


KNOWN = {"gate.looks": cell, "gate.power": cell, "canary.peeking": cell}


def test_cells_are_chosen_by_module_or_by_name() -> None:
    assert list(learning.chosen(KNOWN, "")) == list(KNOWN)
    assert list(learning.chosen(KNOWN, "gate")) == ["gate.looks", "gate.power"]
    assert list(learning.chosen(KNOWN, "canary, gate.power")) == ["gate.power", "canary.peeking"]
    with pytest.raises(ValueError, match=r"no cell gates: gate\.looks"):
        learning.chosen(KNOWN, "gates,gate")


def test_every_module_with_cells_is_found() -> None:
    assert {f"gate.{name}" for name in CELLS} <= set(learning.cells())


def test_the_table_marks_what_was_missed_and_what_was_not_of_full_size() -> None:
    whole = learning.record(Cell("a", "≤ 5 %", "3 %", True, {}), scale=1.0, seconds=1)
    part = learning.record(Cell("b", "≥ 80 %", "79 %", False, {}), scale=0.1, seconds=1)

    text = learning.render({"gate.looks": whole, "gate.power": part})

    assert "| a | ≤ 5 % | 3 % |  |" in text
    assert "| b | ≥ 80 % | 79 % (at 0.1 of the size) | ✗ |" in text


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.what)
def test_null_candidates_have_no_difference_and_the_discordance_that_is_said(world: World) -> None:
    drawn = [table["target"] for seed in range(60) for table in null_candidates(world, np.random.default_rng(seed))]
    differences = np.concatenate([table.candidate - table.baseline for table in drawn])

    assert abs(differences.mean()) < 0.01
    assert (differences != 0).mean() == pytest.approx(0.15, abs=0.02)
    assert min(table.candidate.min() for table in drawn) >= 0
    assert max(table.candidate.max() for table in drawn) <= 1


def test_candidates_that_share_their_changes_resemble_each_other() -> None:
    def likeness(world: World) -> float:
        first, second, *_ = (table["target"] for table in null_candidates(world, np.random.default_rng(1)))
        return float(np.corrcoef(first.candidate - first.baseline, second.candidate - second.baseline)[0, 1])

    assert likeness(WORLDS[1]) > 0.5 > likeness(WORLDS[0])


def test_pairs_have_the_difference_that_is_said() -> None:
    table = pairs(200_000, 0.05, np.random.default_rng(1))

    assert (table.candidate - table.baseline).mean() == pytest.approx(0.05, abs=0.004)
    assert (table.candidate != table.baseline).mean() == pytest.approx(0.15, abs=0.004)


def test_a_gate_without_a_budget_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can fail: at a level of 5 % at every look, most projects promote something."""
    monkeypatch.setattr("worker.gate.looks.Budget.level", lambda _budget, _look, _carried=0.0: 0.05)

    assert sum(ever_promoted(World("small", rows=150), seed) for seed in range(30)) > 9
