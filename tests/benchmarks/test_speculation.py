"""The speculation benchmark measures what it says, goes on where it was cut, and marks goals as missed that are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_speculation, publish, speculation, speculation_table
from benchmarks.figures import STARTER, random_prompts
from benchmarks.speculation import Kept
from benchmarks.speculation_cells import compare, for_arm
from benchmarks.speculation_fixed import Fixed, arms
from benchmarks.speculation_load import Swapper, memory, renamed
from benchmarks.speculation_table import BEGIN, END, lines, render
from benchmarks.speculation_world import Ask, Told, World, interval
from engine.offline import LocalEngine
from engine.speculation.acceptance import Counts
from engine.speculation.policy import Adaptive, Batch
from engine.speculation.tries import Try
from tests.engine.speculators import random_speculator
from worker.training.spec import Request

SETTING = {
    "cpu": "Some CPU", "cpus": 2, "features": ["avx2"], "pairs": 30, "singles": 120, "dtype": "fp32",
    "kernels": "native", "measured": "2026-01-02T03:04:05+00:00", "command": "python -m benchmarks.speculation",
}  # fmt: skip
RATE = {
    "ratio": 2.5, "low": 2.4, "high": 2.6, "drafted": 1.1, "accepted": 0.8, "tokens_per_step": 3.0, "end_to_end": 2.0,
    "heads": True, "best": "suffix 4", "commit": "abc1234",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(STARTER, tmp_path_factory.mktemp("work"), precision="fp32", kv_tokens=8192)
    yield made
    made.close()


def asks_of(number: int, speculator: str | None = None) -> list[Ask]:
    """Requests whose answers the suffix drafter knows little of."""
    texts = random_prompts(STARTER, number, 20, 1)
    return [Ask(text, "tests", 0.8, seed, speculator, most=24) for seed, text in enumerate(texts)]


def reached(cells: dict[str, dict[str, Any]]) -> list[bool]:
    return [line.reached for line in lines(cells)]


def test_tokens_of_the_first_message_are_not_part_of_the_rate() -> None:
    one = Told(0.0, tokens=list(range(8)), times=[1.0, 1.5, 3.0], counts=[5, 1, 2])

    assert one.decode == (3, 2.0)
    assert one.longest_gap == 1.5


def test_a_ratio_weighs_pairs_by_their_length_and_its_interval_holds_it() -> None:
    short, long = ((10.0, 1.0), (10.0, 1.0)), ((300.0, 10.0), (100.0, 10.0))

    ratio, low, high = interval([short, long] * 20)
    assert ratio == pytest.approx((310 / 11) / (110 / 11))
    assert 1 < low < ratio < high < 3
    assert interval([long] * 30) == pytest.approx((3.0, 3.0, 3.0))


@pytest.fixture
def taught(world: World) -> Iterator[tuple[World, list[Told]]]:
    """A world that knows the answers by heart, and these answers; its policy is put back."""
    asks = asks_of(4)
    plain = world.run(for_arm(Fixed(None, 0), asks), 2)
    world.learn("tests", [Request(ask.prompt, one.tokens) for ask, one in zip(asks, plain, strict=True)])
    yield world, plain
    world.core.drafting.policy = Adaptive()


@pytest.mark.parametrize("name", ["none", "suffix 2", "suffix 8"])
def test_drafts_are_counted_and_no_arm_changes_a_token(taught: tuple[World, list[Told]], name: str) -> None:
    world, plain = taught
    world.core.drafting.policy = policy = arms()[name]

    told = world.run(for_arm(policy, asks_of(4)), 2)

    assert [one.tokens for one in told] == [one.tokens for one in plain]
    drafted, accepted = sum(one.drafted for one in told), sum(one.accepted for one in told)
    if name == "none":
        assert drafted == 0
        return
    assert 0 < accepted <= drafted
    assert max(count for one in told for count in one.counts) <= 1 + int(name.split()[1])
    assert sum(len(one.times) for one in told) < sum(len(one.times) for one in plain)


def test_compared_sides_answer_the_same_requests_and_only_one_drafts(taught: tuple[World, list[Told]]) -> None:
    world, _ = taught
    world.core.drafting.policy = Fixed("suffix", 4)
    asked: list[list[bool]] = []

    class Watched:
        def run(self, asks: list[Ask], concurrency: int) -> list[Told]:
            asked.append([ask.speculate for ask in asks])
            return world.run(asks, concurrency)

    cell = compare(Watched(), [asks_of(2), asks_of(2)], 2)  # type: ignore[arg-type]

    assert asked == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert cell["pairs"] == 2
    assert 0 < cell["low"] <= cell["ratio"] <= cell["high"]
    assert cell["tokens_per_step"] > 1
    assert 0 < cell["accepted"] <= 1


def test_a_failed_request_ends_a_measurement_unless_it_is_what_is_counted(world: World) -> None:
    wrong = [Ask([1, 2, 3], "tests", adapter="0" * 64)]

    with pytest.raises(RuntimeError, match="is not loaded"):
        world.run(wrong, 1)
    assert "is not loaded" in world.run(wrong, 1, strict=False)[0].failure


def test_swaps_are_counted_when_they_happened_and_refusals_apart(world: World) -> None:
    root = world.core.config.artifacts
    first = random_speculator(root, STARTER)
    second = renamed(root, first, {"run": "twin"})
    world.load(first)
    swapper = Swapper(world, first, second)
    steps = swapper.steps()
    world.run(asks_of(12, speculator=first), 2, steps)
    assert len(swapper.moments) >= 2
    assert swapper.failed == 0
    swapped = len(swapper.moments)
    while len(swapper.moments) == swapped:  # the last answer may have come in the middle of a swap
        world.idle()
        next(steps)
    assert {slot.digest for slot in world.core.drafting.speculators.table()} & {first, second} == {swapper.now}

    broken = Swapper(world, swapper.now, "f" * 64)
    world.run(asks_of(12), 2, broken.steps())
    assert broken.failed == len(broken.moments) > 0
    with pytest.raises(RuntimeError, match="ffffffffffff"):
        world.load("f" * 64)


def test_a_measured_cell_is_not_measured_again_and_a_failing_one_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "changed", lambda: False)
    calls: list[str] = []

    def action() -> dict[str, Any]:
        calls.append("measured")
        if len(calls) == 1:
            raise RuntimeError("the machine is tired")
        return {"ratio": 1.0}

    kept = Kept(tmp_path / "cells.json")
    kept.measure("crowd 4", action, "abc")
    assert kept.cells == {}
    kept.measure("crowd 4", action, "abc")
    again = Kept(tmp_path / "cells.json")
    again.measure("crowd 4", action, "abc")

    assert len(calls) == 2
    assert again.cells["crowd 4"]["ratio"] == 1.0
    assert again.cells["crowd 4"]["commit"] == "abc"
    monkeypatch.setattr(speculation, "changed", lambda: True)
    again.measure("crowd 16", action, "abc")
    assert again.cells["crowd 16"]["commit"] == "abc-changed"


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("single match greedy after 50", 1.3),
        ("single match greedy after 500", 1.8),
        ("single match greedy after 5000", 3.0),
        ("single match at 0.7 after 5000", 2.0),
        ("crowd 4", 2.0),
        ("crowd 16", 1.4),
        ("mixed batch", 0.95),
    ],
)
def test_ratios_reach_their_goals_or_miss_them(name: str, goal: float) -> None:
    assert reached({name: RATE | {"ratio": goal}}) == [True]
    assert reached({name: RATE | {"ratio": goal - 0.01}}) == [False]


@pytest.mark.parametrize("name", ["crowd 64", "unpredictable 1", "hindsight match 1", "hindsight mixed 16"])
def test_what_must_never_cost_is_judged_by_its_lower_bound(name: str) -> None:
    assert reached({name: RATE | {"ratio": 1.0, "low": 0.95}}) == [True]
    assert reached({name: RATE | {"ratio": 1.2, "low": 0.94}}) == [False]


def test_swaps_memory_and_training_have_goals_of_their_own() -> None:
    swaps = {"swaps": 200, "refused": 0, "failed": 0, "wrong": 0, "added_ms": 3.0, "control_ms": 9.0}
    assert reached({"swaps": swaps}) == [True]
    for bad in ({"refused": 1}, {"failed": 1}, {"wrong": 1}, {"added_ms": 50.0}):
        assert reached({"swaps": swaps | bad}) == [False]

    assert reached({"memory": {"megabytes": 40.0, "later": 40.0}}) == [True]
    assert reached({"memory": {"megabytes": 40.0, "later": 50.0}}) == [False]
    assert reached({"memory": {"megabytes": 65.0, "later": 65.0}}) == [False]

    trained = {"seconds": 170.0, "promote": True}
    assert reached({"training": {"applications": {"chat": trained}}}) == [True]
    assert reached({"training": {"applications": {"chat": trained | {"seconds": 181.0}}}}) == [False]
    refused = {"training": {"applications": {"chat": trained | {"promote": False}}}}
    assert reached(refused) == [False]
    assert "the gate refused chat" in next(lines(refused)).found


def test_publishing_replaces_what_stands_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(publish, "README", readme)
    monkeypatch.setattr(speculation_table, "RESULTS", tmp_path / "results")
    cells = {"crowd 4": RATE, "crowd 16": RATE | {"ratio": 1.2}}

    speculation_table.publish(SETTING, cells)

    page = render(SETTING, cells)
    assert readme.read_text() == f"before\n{BEGIN}\n{page}{END}\nafter\n"
    assert (tmp_path / "results" / "speculation.md").read_text() == page
    assert json.loads((tmp_path / "results" / "speculation-2026-01-02.json").read_text())["cells"] == cells
    row = next(line for line in page.splitlines() if line.startswith("| 16 streams"))
    assert "**1.20** [2.40, 2.60]" in row
    assert row.endswith("| missed |")
    assert "commit abc1234" in page
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="speculation:begin"):
        speculation_table.publish(SETTING, cells)


def test_a_full_corpus_stays_as_large_as_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speculation_load.CORPUS_TOKENS", 1 << 12)

    cell = memory(world)

    assert 0 < cell["megabytes"] <= cell["later"]
    assert "full" not in {one.namespace for one in world.core.drafting.corpora.status()}


def test_a_forced_share_of_drafted_tokens_is_right() -> None:
    drafts = [[5] * 16 for _ in range(200)]
    tries = [[Try("suffix", tokens, [0] * 16, [0.5] * 16, Counts(1))] for tokens in drafts]
    costs = [0.001] * 64

    chosen = gpu_speculation.Forced(0.6, 100).select(tries, Batch(1, costs, 40), drafting=True)

    assert len(chosen) == 200
    right = [token == 5 for tokens in drafts for token in tokens]
    assert 0.57 < sum(right) / len(right) < 0.63
    assert all(one is each[0] for (one, _), each in zip(chosen, tries, strict=True))


def test_forced_drafts_are_verified_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speculation, "SHARES", (0.9,))
    with LocalEngine(STARTER, precision="fp32", max_running=2) as engine:
        row = gpu_speculation.measure(engine, STARTER, 16, 64, batches=[1], pairs=1)[0]
        assert type(engine.core.drafting.policy) is Adaptive

    assert row["forced"] == 0.9
    assert row["drafted_a_token"] > 0
    assert 0 < row["accepted"] <= 1
    assert row["low"] <= row["ratio"] <= row["high"]
