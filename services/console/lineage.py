"""The lineage of a revision as a drawing: boxes in four columns, curves between them."""

from typing import NamedTuple

from services.store.lineage import Lineage, Source
from services.store.models import Revision

WIDTH, BOX_WIDTH, BOX_HEIGHT, GAP, TOP = 1000, 200, 48, 16, 30
COLUMNS = (0, 266, 533, 800)
TITLES = ("Judged or imported", "Revision", "Runs", "Adapters")
SOURCES_MOST = 6
LETTERS = 25


class Box(NamedTuple):
    """A node: two lines of text, where it leads, and whether it is the revision, serves, or failed."""

    x: int
    y: float
    title: str
    detail: str
    href: str | None
    mood: str


Raw = tuple[str, str, str | None, str]  # a box without its place


class Drawing(NamedTuple):
    """Boxes, and the curves' paths."""

    width: int
    height: float
    heads: list[tuple[int, str]]
    boxes: list[Box]
    paths: list[str]
    told: str


def draw(slug: str, dataset: str, revision: Revision, lineage: Lineage) -> Drawing:
    """The whole picture; `told` is the same in a sentence, for who cannot see it."""
    here = f"/p/{slug}"
    sources = _sources(here, lineage.sources)
    middle = _revisions(f"{here}/datasets/{dataset}", revision)
    runs: list[Raw] = [
        (f"{one.kind} run", one.phase, f"{here}/runs/{one.run_id}", "bad" if one.state == "failed" else "")
        for one in lineage.outcomes
    ]
    made = [one for one in lineage.outcomes if one.artifact_digest]
    adapters: list[Raw] = [
        (
            (one.artifact_digest or "")[:10], "serves now" if one.serves else one.artifact_state or "gone",
            f"{here}/deployment" if one.serves else None, "live" if one.serves else "",
        )
        for one in made
    ]  # fmt: skip
    raw: list[list[Raw]] = [sources, middle, runs, adapters]
    height = TOP + max(map(len, raw)) * (BOX_HEIGHT + GAP)
    columns = [_placed(place, column, height) for place, column in enumerate(raw)]
    left, revisions, ran, ended = columns
    paths = [_curve(box, revisions[0]) for box in left] + [_curve(revisions[0], box) for box in ran]
    if len(revisions) > 1:
        paths.append(_between(revisions[1], revisions[0]))
    by_digest = {one.artifact_digest: box for one, box in zip(made, ended, strict=True)}
    paths += [
        _curve(box, by_digest[one.artifact_digest])
        for one, box in zip(lineage.outcomes, ran, strict=True)
        if one.artifact_digest
    ]
    heads = [(COLUMNS[place], title) for place, title in enumerate(TITLES) if raw[place]]
    told = (
        f"{revision.train_count + revision.held_out_count} examples from {len(lineage.sources)} sources; "
        f"{len(runs)} runs; {len(made)} adapters, {sum(one.serves for one in made)} of them serving"
    )
    return Drawing(WIDTH, height, heads, [box for column in columns for box in column], paths, told)


def _sources(here: str, sources: list[Source]) -> list[Raw]:
    shown = [_source(here, one) for one in sources[:SOURCES_MOST]]
    rest = sources[SOURCES_MOST:]
    if rest:
        shown.append((f"{len(rest)} more", f"{sum(one.examples for one in rest):,} examples", None, ""))
    return shown


def _source(here: str, one: Source) -> Raw:
    count = f"{one.examples:,} example{'' if one.examples == 1 else 's'}"
    if one.kind == "imported":
        return (_cut(one.name or "file"), f"{count}, imported", None, "")
    if one.kind == "unlogged":
        return ("past their retention", count, None, "")
    served_by = one.name or "base"
    return (f"answers of {served_by[:10]}", count, f"{here}/interactions?digest={served_by}", "")


def _revisions(here: str, revision: Revision) -> list[Raw]:
    counts = f"{revision.train_count:,} train, {revision.held_out_count:,} held out"
    found: list[Raw] = [(revision.digest[:10], counts, None, "here")]
    if revision.parent_digest:
        found.append(
            (f"parent {revision.parent_digest[:10]}", "before this one", f"{here}/{revision.parent_digest}", "")
        )
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def _placed(place: int, column: list[Raw], height: float) -> list[Box]:
    """Stacked around the middle of the drawing."""
    used = len(column) * (BOX_HEIGHT + GAP) - GAP
    start = TOP + (height - TOP - GAP - used) / 2
    return [Box(COLUMNS[place], start + index * (BOX_HEIGHT + GAP), *raw) for index, raw in enumerate(column)]


def _curve(one: Box, other: Box) -> str:
    start, end = one.x + BOX_WIDTH, other.x
    middle = (start + end) / 2
    y, z = one.y + BOX_HEIGHT / 2, other.y + BOX_HEIGHT / 2
    return f"M{start},{y:g} C{middle:g},{y:g} {middle:g},{z:g} {end},{z:g}"


def _between(below: Box, above: Box) -> str:
    x = above.x + BOX_WIDTH / 2
    return f"M{x:g},{below.y:g} L{x:g},{above.y + BOX_HEIGHT:g}"
