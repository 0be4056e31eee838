"""What steps cost: learnt from real steps whatever the start, at every number of rows."""

import random

import pytest

from engine.speculation.costs import Line, StepCosts


def truth(rows: int, tokens: int) -> float:
    """Seconds of a step on a machine that waits for arithmetic."""
    return (0.4 + 0.05 * rows + 0.13 * tokens) / 1000


def taught(start: float, rows: int, steps: int = 3000) -> StepCosts:
    """Costs that began wrong by a factor and saw so many steps, one in sixteen of them with drafts."""
    costs, dice = StepCosts(512), random.Random(rows)
    costs.measure(lambda *_: None, seconds=0.0)
    for line in costs._lines:
        line.points = [start * truth(line.rows, size) for size in line.sizes]
    for step in range(steps):
        tokens = rows * 2 if step % 16 == 0 else rows
        costs.learn(rows, tokens, 200, truth(rows, tokens) * dice.uniform(0.9, 1.1))
    return costs


@pytest.mark.parametrize("start", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 12, 16, 25, 26, 30, 40, 63, 64, 90])
def test_costs_become_true_whatever_they_began_with(rows: int, start: float) -> None:
    table = taught(start, rows).table(rows, 200)
    assert table == sorted(table)
    for tokens in (rows, 2 * rows):
        assert table[tokens] == pytest.approx(truth(rows, tokens), rel=0.15)
    assert table[min(5 * rows, 512)] == pytest.approx(truth(rows, min(5 * rows, 512)), rel=0.45)


def test_what_was_too_dear_to_measure_follows_what_was_measured() -> None:
    line = Line(4, 128, 64)
    line.measured(0.05)
    line.measured(0.06)
    line.extrapolate(None)
    assert line.table == sorted(line.table)
    assert line.table[64] > 0.06
    unknown = Line(16, 128, 64)
    unknown.extrapolate(line)
    assert unknown.table[6] >= line.cost(6)


@pytest.mark.parametrize("most", [16, 17, 100, 512, 2048])
def test_a_table_has_an_entry_for_every_size(most: int) -> None:
    costs = StepCosts(most)
    for rows in (1, 4, 16, 64, 500):
        assert len(costs.table(rows, 10_000)) == most + 1
        costs.learn(rows, most, 10_000, 1.0)
        costs.learn(rows, most + 1, 10_000, 1.0)
