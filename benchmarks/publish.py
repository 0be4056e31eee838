"""Measured records as a Markdown page, and as the part of README between its markers."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.results import Record, Results

T = TypeVar("T")
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- serving:begin -->", "<!-- serving:end -->"
TITLES = {
    "whet": "Whet", "engine": "engine alone", "vllm": "vLLM", "transformers": "transformers serve",
    "llamacpp": "llama.cpp",
}  # fmt: skip
OTHERS = ("vllm", "transformers", "llamacpp")
# What Whet is to reach: its tokens a second over theirs at concurrency 1, 4, 16; for all shapes, or for one.
GOALS: dict[tuple[str, str, str], tuple[float, float, float]] = {
    ("tiny", "vllm", "350/50"): (1.3, 1.3, 1.1),
    ("tiny", "vllm", "120/25"): (1.5, 2.0, 1.5),
    ("tiny", "vllm", "50/100"): (1.5, 2.0, 2.5),
    ("small", "vllm", ""): (1.0, 1.0, 1.0),
    ("tiny", "transformers", ""): (2.5, 2.5, 2.5),
    ("small", "transformers", ""): (2.5, 2.5, 2.5),
    ("tiny", "llamacpp", ""): (0.4, 0.6, 1.2),
    ("small", "llamacpp", ""): (0.9, 1.2, 1.5),
    ("tiny", "engine", ""): (0.9, 0.85, 0.75),
    ("small", "engine", ""): (0.9, 0.9, 0.9),
}
CONCURRENCY = (1, 4, 16)


def write(results: Results, page: Path, *, into_readme: bool) -> None:
    """Write the page; replace what stands between README's markers, when asked to."""
    text = render(results.runs, results.records)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    if into_readme:
        README.write_text(between_markers(README.read_text(), text))


def between_markers(readme: str, text: str, first: str = BEGIN, last: str = END) -> str:
    """README with the part between the markers replaced. Raises ValueError when it has none."""
    head, begin, rest = readme.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"README has no {first} … {last}")
    return f"{head}{first}\n{text}{last}{tail}"


def render(runs: Sequence[Record], records: Sequence[Record]) -> str:
    """The whole page."""
    parts = [preface(runs, records)]
    for case in unique(record["case"] for record in records):
        mine = [record for record in records if record["case"] == case]
        servers = [name for name in TITLES if any(record["server"] == name for record in mine)]
        parts += [f"**{case}**", speed(case, mine, servers), starts(mine, servers), arrivals(mine, servers)]
        parts.append(failures(mine))
    return "\n\n".join(part for part in parts if part) + "\n"


def preface(runs: Sequence[Record], records: Sequence[Record]) -> str:
    """On what, with which versions, by which command."""
    last = runs[-1]
    host = last["machine"]
    versions = {name: text for run in runs for name, text in run["versions"].items() if text}
    listed = "; ".join(f"{TITLES[name]}: {text}" for name, text in versions.items())
    # A file may be continued after the code has changed: every command names the commit it ran at.
    commands = ", then ".join(unique(f"`{run['command']}` at commit {run['commit']}" for run in runs))
    share = max((record["client_share"] for record in records if "client_share" in record), default=0.0)
    return (
        f"{host['cpus']} cores of {host['cpu']} ({', '.join(host['features'])}), {host['memory_gib']:g} GiB, "
        f"{last['began'][:10]}. {listed}. {commands}. Output tokens a second over HTTP, "
        "streamed, closed loop: median (minimum to maximum) of the rounds. ÷ are ratios of medians; ✗ is a missed "
        f"goal. The client, on the same cores, took at most {100 * share:.1f} % of one core."
    )


def speed(case: str, records: Sequence[Record], servers: Sequence[str]) -> str:
    """Tokens a second of every server, and Whet over each."""
    cells = [record for record in records if record["kind"] == "cell"]
    over = [name for name in ("engine", *OTHERS) if name in servers and "whet" in servers]
    late = "vllm" in over
    header = ["in/out", "at once", *(TITLES[name] for name in servers), *(f"÷ {TITLES[name]}" for name in over)]
    rows = [header + (["TTFT p95 ÷ vLLM"] if late else [])]
    for shape, concurrency in unique((record["shape"], record["concurrency"]) for record in cells):
        here = [record for record in cells if (record["shape"], record["concurrency"]) == (shape, concurrency)]
        speeds = {name: [r["tokens_per_second"] for r in here if r["server"] == name] for name in servers}
        ratios = [ratio(speeds["whet"], speeds[name], goal(case, name, shape, concurrency)) for name in over]
        rows.append([shape, str(concurrency), *(spread(speeds[name]) for name in servers), *ratios])
        rows[-1] += [ratio(first_tokens(here, "whet"), first_tokens(here, "vllm"), -1.0)] if late else []
    return table(rows) if len(rows) > 1 else ""


def first_tokens(cells: Sequence[Record], server: str) -> list[float]:
    """p95 of the time to the first token, a figure a round."""
    return [record["ttft_ms"]["p95"] for record in cells if record["server"] == server]


def starts(records: Sequence[Record], servers: Sequence[str]) -> str:
    """Seconds to the first token and resident memory after the load."""
    rows = [["", "start to first token, s", "resident (PSS), MB", "resident (sum of RSS), MB", "largest processes, MB"]]
    for name in servers:
        mine = [record for record in records if record["server"] == name]
        began = [record["first_token_seconds"] for record in mine if record["kind"] == "start"]
        held = [record for record in mine if record["kind"] == "memory"]
        if began or held:
            largest = sorted(held[-1]["processes_mb"].items(), key=lambda item: -item[1])[:3] if held else []
            rows.append([
                TITLES[name], spread(began, 1), spread([record["pss_mb"] for record in held]),
                spread([record["rss_mb"] for record in held]), ", ".join(f"{part} {size}" for part, size in largest),
            ])  # fmt: skip
    return table(rows) if len(rows) > 1 else ""


def arrivals(records: Sequence[Record], servers: Sequence[str]) -> str:
    """Poisson arrivals: what a user sees at each rate, p50 / p95."""
    asked = [record for record in records if record["kind"] == "poisson"]
    rows = [["arrivals a second", "server", "TTFT, ms", "inter-token, ms", "end to end, ms"]]
    for rate in sorted({record["qps"] for record in asked}):
        for name in servers:
            found = [record for record in asked if record["qps"] == rate and record["server"] == name]
            rows += [[f"{rate:g}", TITLES[name], *pairs(record)] for record in found]
    return "Poisson arrivals, p50 / p95:\n\n" + table(rows) if len(rows) > 1 else ""


def failures(records: Sequence[Record]) -> str:
    """What did not run, or lost requests."""
    done = {(record["server"], record["round"]) for record in records if record["kind"] != "failure"}
    failed = [r for r in records if r["kind"] == "failure" and (r["server"], r["round"]) not in done]
    broken = [f"{TITLES[r['server']]}: {r['error'].splitlines()[0][:200]}" for r in failed]
    lost = [
        f"{TITLES[r['server']]}: {r['failed']} of {r['requests']} requests failed" for r in records if r.get("failed")
    ]
    return "\n".join(f"- {line}" for line in unique(broken + lost))


def pairs(record: Record) -> list[str]:
    """p50 / p95 of the three times; an overloaded server has none worth printing."""
    if record["overloaded"]:
        return ["overloaded", "", ""]
    times = [record[name] for name in ("ttft_ms", "inter_token_ms", "end_to_end_ms")]
    return [f"{figure(time['p50'])} / {figure(time['p95'])}" for time in times]


def goal(case: str, server: str, shape: str, concurrency: int) -> float:
    """The least ratio asked for; 0 when nothing was."""
    size = case.partition("-")[0]
    asked = GOALS.get((size, server, shape)) or GOALS.get((size, server, ""))
    return asked[CONCURRENCY.index(concurrency)] if asked and concurrency in CONCURRENCY else 0.0


def ratio(ours: Sequence[float], theirs: Sequence[float], least: float) -> str:
    """Median over median; a negative goal is 'at most'."""
    if not ours or not theirs:
        return ""
    value = statistics.median(ours) / statistics.median(theirs)
    missed = value > -least if least < 0 else value < least
    return f"{value:.2f}{' ✗' if missed else ''}"


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Median (minimum to maximum)."""
    if not values:
        return ""
    shown = [figure(value, digits) for value in (statistics.median(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def figure(value: float, digits: int | None = None) -> str:
    """Three significant digits at most after the comma of small values, thousands apart."""
    places = digits if digits is not None else 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{places}f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def unique(values: Iterable[T]) -> list[T]:
    """In order, each once."""
    return list(dict.fromkeys(values))
