"""The demo's picture: what one run of the loop did to quality and to latency, over time."""

from datetime import datetime
from pathlib import Path
from typing import TypeVar

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from examples.loop.report import Report, Served, wilson
from examples.loop.turbo import Timed

INK, FAINT, GOOD, BAD, MARK = "#1c2430", "#8a94a3", "#0f8a6d", "#c2562d", "#3b5bdb"
BINS = 40
PROBED = {"start": "start", "warm": "50 requests", "adapted": "trained", "heads": "heads live"}

Row = TypeVar("Row", Served, Timed)


def draw(report: Report, path: Path) -> None:
    """Write the picture; the format follows the file's suffix (.png or .svg)."""
    mpl.rcParams |= {"font.size": 10, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK,
                     "xtick.color": FAINT, "ytick.color": FAINT, "svg.hashsalt": "whet"}  # fmt: skip
    figure, (quality, latency, speed) = plt.subplots(
        3, 1, figsize=(9, 7.6), sharex=True, height_ratios=(3, 2, 3), layout="constrained"
    )
    start = report.served[0].started
    _quality(quality, report, start)
    _latency(latency, report, start)
    _speed(speed, report, start)
    for axis in (quality, latency, speed):
        axis.spines[["top", "right"]].set_visible(False)
        axis.axvspan(
            _seconds(report.training_started_at, start), _seconds(report.training_finished_at, start),
            color=MARK, alpha=0.08, linewidth=0,
        )  # fmt: skip
        axis.axvline(_seconds(report.last_correction_at, start), color=FAINT, linewidth=1, linestyle=":")
        if report.swapped_at:
            axis.axvline(_seconds(report.swapped_at, start), color=MARK, linewidth=1.2)
        if report.turbo.heads_live_at:
            axis.axvline(_seconds(report.turbo.heads_live_at, start), color=GOOD, linewidth=1.2)
    speed.set_xlabel(
        f"seconds since the first request · {report.rows:,} requests, {report.rows_not_finished_well} failed"
    )
    figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _quality(axis: Axes, report: Report, start: datetime) -> None:
    """House-rule score of live traffic in time bins, with its interval."""
    middles, shares = [], []
    for middle, rows in _bins(report.served, start):
        middles.append(middle)
        shares.append(wilson(sum(row.good for row in rows), len(rows)))
    axis.fill_between(middles, [s.low * 100 for s in shares], [s.high * 100 for s in shares], color=GOOD, alpha=0.18)
    axis.plot(middles, [s.share * 100 for s in shares], color=GOOD, linewidth=2)
    axis.set_ylim(-4, 104)
    axis.set_ylabel("house rules followed, %")
    axis.set_title(
        f"{report.application}: live traffic, each prompt sent once (band: 95 % interval)", loc="left", fontsize=11
    )
    marks = [(report.last_correction_at, "last correction"), (report.training_started_at, "training")]
    if report.swapped_at:
        marks.append((report.swapped_at, "swap"))
    for row, (at, label) in enumerate(marks):
        axis.annotate(
            label,
            (_seconds(at, start), 96 - 9 * row),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
            color=MARK,
        )


def _latency(axis: Axes, report: Report, start: datetime) -> None:
    """Longest pause between chunks of each stream; failures are drawn, not left out."""
    done = [row for row in report.served if row.gap_ms is not None]
    axis.scatter(
        [_seconds(row.finished, start) for row in done], [row.gap_ms or 0 for row in done],
        s=5, color=INK, alpha=0.35, linewidths=0,
    )  # fmt: skip
    for row in report.served:
        if not row.ended_well:
            axis.axvline(_seconds(row.finished, start), color=BAD, linewidth=1)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("longest pause\nin a stream, ms")


def _speed(axis: Axes, report: Report, start: datetime) -> None:
    """Decode rate of every stream: medians in time bins, with drafts and without; the probes stand out."""
    tops: list[float] = []
    for drafted, colour, label in ((True, GOOD, "with drafts"), (False, FAINT, "without drafts")):
        rows = [row for row in report.turbo.timed if row.drafted is drafted]
        axis.scatter(
            [_seconds(row.finished, start) for row in rows], [row.rate for row in rows],
            s=4, color=colour, alpha=0.25, linewidths=0,
        )  # fmt: skip
        binned = _bins(rows, start)
        medians = [float(np.median([row.rate for row in rows])) for _, rows in binned]
        axis.plot([middle for middle, _ in binned], medians, color=colour, linewidth=1.6, label=label)
        for stage in report.turbo.stages:
            rates = stage.rates.drafted if drafted else stage.rates.plain
            if rates:
                reach = [[rates.median - rates.low], [rates.high - rates.median]]
                axis.errorbar(
                    [_seconds(stage.at, start)], [rates.median], reach,
                    fmt="D", markersize=5, color=colour, ecolor=colour, markeredgecolor=INK,
                )  # fmt: skip
        tops += [*medians, *(rates.high for stage in report.turbo.stages for rates in stage.rates if rates)]
    if tops:
        # Answers whose text came at once have no rate to speak of, and must not press the others flat.
        axis.set_ylim(0, 1.6 * float(np.percentile(tops, 90)))
        axis.legend(loc="upper right", bbox_to_anchor=(1, 0.9), fontsize=8, frameon=False, ncols=2)
    for number, stage in enumerate(report.turbo.stages):
        axis.annotate(
            PROBED[stage.name], (_seconds(stage.at, start), 1), xycoords=("data", "axes fraction"),
            xytext=(0, -2 - 11 * (number % 2)), textcoords="offset points", fontsize=8, color=MARK, ha="center",
            va="top",
        )  # fmt: skip
    axis.set_ylabel("tokens a second\nof one stream")


def _bins(served: list[Row], start: datetime) -> list[tuple[float, list[Row]]]:
    if not served:
        return []
    times = np.array([_seconds(row.finished, start) for row in served])
    edges = np.linspace(0, times.max() + 1e-6, BINS + 1)
    which = np.digitize(times, edges) - 1
    filled = [(index, [served[i] for i in np.flatnonzero(which == index)]) for index in range(BINS)]
    return [(float(edges[index] + edges[index + 1]) / 2, rows) for index, rows in filled if rows]


def _seconds(at: datetime, start: datetime) -> float:
    return (at - start).total_seconds()
