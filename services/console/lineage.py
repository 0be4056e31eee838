"""The lineage of a revision as a drawing: what it was made of, itself, its runs, their adapters."""

from services.console.graph import Column, Drawing, Node, Place, lay_out
from services.store.lineage import Lineage, Outcome, Source
from services.store.models import Revision

WIDTH, BOX_WIDTH = 1000, 200
SOURCES_MOST = 6


def draw(slug: str, dataset: str, revision: Revision, lineage: Lineage) -> Drawing:
    """The whole picture; `told` is the same in a sentence, for who cannot see it."""
    here = f"/p/{slug}"
    made = [one for one in lineage.outcomes if one.artifact_digest]
    columns = [
        Column("Judged or imported", _sources(here, lineage.sources)),
        Column("Revision", _revisions(f"{here}/datasets/{dataset}", revision)),
        Column("Runs", [_run(here, one) for one in lineage.outcomes]),
        Column("Adapters", [_adapter(here, one) for one in made]),
    ]
    told = (
        f"{revision.train_count + revision.held_out_count} examples from {len(lineage.sources)} sources; "
        f"{len(lineage.outcomes)} runs; {len(made)} adapters, {sum(one.serves for one in made)} of them serving"
    )
    return lay_out(columns, _edges(columns, lineage.outcomes), told, width=WIDTH, box_width=BOX_WIDTH)


def _edges(columns: list[Column], outcomes: list[Outcome]) -> list[tuple[Place, Place]]:
    """From what it was made of to the revision, on to its runs, and from each to what it made."""
    here = Place(1, 0)
    edges = [(Place(0, row), here) for row in range(len(columns[0].nodes))]
    edges += [(here, Place(2, row)) for row in range(len(outcomes))]
    edges += [(Place(1, row), here) for row in range(1, len(columns[1].nodes))]
    made = [row for row, one in enumerate(outcomes) if one.artifact_digest]
    return edges + [(Place(2, row), Place(3, place)) for place, row in enumerate(made)]


def _run(here: str, one: Outcome) -> Node:
    return Node(f"{one.kind} run", one.phase, f"{here}/runs/{one.run_id}", "bad" if one.state == "failed" else "")


def _adapter(here: str, one: Outcome) -> Node:
    digest = one.artifact_digest or ""
    state = "serves now" if one.serves else (one.artifact_state or "gone").replace("_", " ")
    return Node(digest[:10], state, f"{here}/artifacts/{digest}", "live" if one.serves else "")


def _sources(here: str, sources: list[Source]) -> list[Node]:
    shown = [_source(here, one) for one in sources[:SOURCES_MOST]]
    rest = sources[SOURCES_MOST:]
    if rest:
        shown.append(Node(f"{len(rest)} more", f"{sum(one.examples for one in rest):,} examples"))
    return shown


def _source(here: str, one: Source) -> Node:
    count = f"{one.examples:,} example{'' if one.examples == 1 else 's'}"
    if one.kind == "imported":
        return Node(one.name or "file", f"{count}, imported")
    if one.kind == "unlogged":
        return Node("past their retention", count)
    served_by = one.name or "base"
    return Node(f"answers of {served_by[:10]}", count, f"{here}/interactions?digest={served_by}")


def _revisions(here: str, revision: Revision) -> list[Node]:
    counts = f"{revision.train_count:,} train, {revision.held_out_count:,} held out"
    found = [Node(revision.digest[:10], counts, None, "here")]
    if revision.parent_digest:
        parent = revision.parent_digest
        found.append(Node(f"parent {parent[:10]}", "before this one", f"{here}/{parent}"))
    return found
