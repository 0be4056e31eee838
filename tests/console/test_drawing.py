"""Geometry, differences, words, and the files that came from elsewhere."""

import hashlib
import math
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.console import charts, wording
from services.console.memo import Memo
from services.console.views import WEB
from services.console.worddiff import LETTERS_MOST, Piece, diff, longest_common


def test_vendored_files_are_the_published_ones() -> None:
    vendor = WEB / "static" / "vendor"
    listed = dict(reversed(line.split("  ")) for line in (vendor / "MANIFEST.sha256").read_text().splitlines())
    present = {path.name for path in vendor.iterdir()} - {"MANIFEST.sha256", "README.md"}
    assert set(listed) == present
    for name, digest in listed.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest, name
        assert name in (vendor / "README.md").read_text()


def test_every_static_file_a_page_names_exists() -> None:
    named = set()
    for template in (WEB / "templates").glob("*.html"):
        named |= set(re.findall(r'"/static/([^"{]+)"', template.read_text()))
    for sheet in (WEB / "static").glob("*.css"):
        named |= set(re.findall(r'url\("([^"]+)"\)', sheet.read_text()))
    for module in (WEB / "static").rglob("[!v]*/*.js"):
        named |= {f"review/{name}" for name in re.findall(r'from "\./([^"]+)"', module.read_text())}
    assert len(named) > 8
    assert [name for name in named if not (WEB / "static" / name).is_file()] == []


TEXTS = st.text(max_size=200) | st.text("ab \n.", max_size=60)


@given(TEXTS, TEXTS)
def test_a_difference_rebuilds_both_texts(old: str, new: str) -> None:
    pieces = diff(old, new)
    assert "".join(piece.text for piece in pieces if piece.kind != "new") == old
    assert "".join(piece.text for piece in pieces if piece.kind != "gone") == new


def test_a_difference_marks_words_and_not_letters() -> None:
    assert [(piece.kind, piece.text) for piece in diff("a big dog", "a small dog")] == [
        ("same", "a "), ("gone", "big"), ("new", "small"), ("same", " dog"),
    ]  # fmt: skip


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_words_that_stay_are_as_many_as_the_classic_table_says(old: list[str], new: list[str]) -> None:
    table = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i, word in enumerate(old):
        for j, other in enumerate(new):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    matches = longest_common(old, new)
    assert len(matches) == table[-1][-1]
    assert all(old[one.old] == new[one.new] for one in matches)
    assert all(a.old < b.old and a.new < b.new for a, b in pairwise(matches))


def test_blanks_are_not_compared_and_not_lost() -> None:
    assert [(piece.kind, piece.text) for piece in diff("a  big dog\n", "a big dog")] == [
        ("same", "a"), ("gone", "  "), ("new", " "), ("same", "big dog"), ("gone", "\n"),
    ]  # fmt: skip


def test_a_word_that_two_sentences_share_by_chance_does_not_cut_them_up() -> None:
    old, new = "Ada and Bo came late that day", "Nobody knows who wrote and sent this"
    assert [piece.kind for piece in diff(old, new)] == ["gone", "new"]


def test_a_large_pair_without_a_likeness_is_shown_whole() -> None:
    old, new = (" ".join(f"{letter}{place % 700}" for place in range(1800)) for letter in "ab")
    assert diff(f"Yes: {old} so.", f"Yes: {new} so.") == [
        Piece("same", "Yes: "), Piece("gone", old), Piece("new", new), Piece("same", " so."),
    ]  # fmt: skip
    assert diff("a" * LETTERS_MOST + "!", "b") == [Piece("gone", "a" * LETTERS_MOST + "!"), Piece("new", "b")]


def test_a_long_text_with_one_word_changed_shows_that_word() -> None:
    words = [f"w{place}" for place in range(2400)]
    changed = [*words[:1500], "other", *words[1501:]]
    pieces = diff(" ".join(words), " ".join(changed))
    assert [piece for piece in pieces if piece.kind != "same"] == [Piece("gone", "w1500"), Piece("new", "other")]


@given(
    st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(2, 8),
)  # fmt: skip
def test_ticks_cover_the_range_with_few_marks(one: float, other: float, wanted: int) -> None:
    low, high = min(one, other), max(one, other)
    marks = charts.ticks(low, high, wanted)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= wanted + 3


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=20))
def test_a_chart_of_any_numbers_stays_inside_its_frame(points: list[tuple[float, float]]) -> None:
    bounded = [(x, y) for x, y in points if not (abs(x) > 1e100 or abs(y) > 1e100)]
    line = charts.line_chart(bounded)
    for x, y, *_ in line.points:
        assert math.isfinite(x)
        assert -1 <= x <= line.width + 1
        assert -1 <= y <= line.height + 1


def test_ticks_are_labelled_without_needless_digits() -> None:
    assert [charts.label(value) for value in (0.0, 0.25, -1.5, 7500.0, 10_000.0, -250_000.0, 2e-5)] == [
        "0", "0.25", "−1.5", "7,500", "10,000", "−250,000", "2e−5",
    ]  # fmt: skip


def test_a_forest_always_shows_zero_and_the_margin() -> None:
    drawn = charts.forest([(0.5, 0.4, 0.6)], margin=-0.03)
    row = drawn.rows[0]
    assert 0 < (drawn.margin or 0) < drawn.zero < row.low < row.at < row.high < drawn.width


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0042, "4.2 ms"), (0.34, "340 ms"), (12.345, "12.3 s"), (125, "2 min 05 s"), (7260, "2 h 01 min"), (None, "–")],
)
def test_durations_in_the_unit_that_suits(seconds: float | None, expected: str) -> None:
    assert wording.duration(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1, "just now"), (42, "42 s ago"), (61, "1 min ago"), (7300, "2 h ago"), (900_000, "10 d ago")],
)
def test_how_long_ago(seconds: float, expected: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert wording.ago(now - timedelta(seconds=seconds), now) == expected


def test_a_figure_is_computed_once_a_while_and_a_failure_is_not_kept() -> None:
    now, calls = [0.0], []

    def compute() -> int:
        calls.append(now[0])
        if len(calls) == 1:
            raise OSError("away")
        return len(calls)

    memo: Memo[int] = Memo(10, clock=lambda: now[0])
    with pytest.raises(OSError, match="away"):
        memo.get("a", compute)
    assert [memo.get("a", compute), memo.get("a", compute), memo.get("b", compute)] == [2, 2, 3]
    now[0] = 10.0
    assert memo.get("a", compute) == 4


def test_figures_in_words() -> None:
    assert [wording.count(1284), wording.percent(0.912), wording.points(-0.031), wording.figure(0.00214)] == [
        "1,284", "91.2 %", "−3.1", "0.00214",
    ]  # fmt: skip
    assert [wording.capped(9999), wording.capped(10_000)] == ["9,999", "10,000+"]
    assert wording.short(None) == "base"
    assert wording.content_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "a\nb"


READINGS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1)), max_size=30)


@given(READINGS, st.floats(300, 86_400))
def test_bands_and_columns_stay_inside_their_frames(readings: list[tuple[float, float]], span: float) -> None:
    since = 1.7e9
    step = span / max(1, len(readings))
    series = [
        charts.Reading(since + place * step, value, value * (1 - share), value * (1 + share), 3)
        for place, (value, share) in enumerate(readings)
    ]
    plot = charts.bands([series, []], since, since + span)
    drawn = [float(number) for band in plot.series for number in re.findall(r"-?\d+\.?\d*", band.path + band.area)]
    assert all(-1 <= number <= plot.width + 1 for number in drawn)
    assert all(-1 <= y <= plot.bottom + 1 for band in plot.series for _, y, _ in band.points)
    shares = [(share / 2, share / 2, 1 - share) for _, share in readings]
    bars = charts.columns(shares, since, since + span)
    for x, width, parts in bars.columns:
        assert bars.left <= x <= x + width <= bars.width
        assert all(5 <= y <= bars.bottom + 0.1 for y, _ in parts)
        assert sum(height for _, height in parts) == pytest.approx(bars.bottom - 10, abs=0.3)
    assert 1 <= len(plot.x_ticks) <= 8
    assert all(plot.left <= tick.at <= plot.width for tick in plot.x_ticks)
