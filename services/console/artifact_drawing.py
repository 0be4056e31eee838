"""An artefact's lineage as a drawing: what it was trained on, the run, itself, its evaluations, where it answered."""

from services.console.graph import Column, Drawing, Node, Place, lay_out
from services.store.artifact_view import About, Answered
from services.store.models import Evaluation
from services.store.served import Span

WIDTH, BOX_WIDTH = 1000, 176
MOST = 5


def draw(slug: str, about: About, answered: Answered) -> Drawing:
    """The whole picture; `told` is the same in a sentence."""
    here = f"/p/{slug}"
    digest = about.artifact.digest
    columns = [
        Column("Learned from", [_source(here, about), *_replayed(about)]),
        Column("Run", [_run(here, about)] if about.run else []),
        Column("Artefact", [Node(digest[:12], about.artifact.state.replace("_", " "), None, "here")]),
        Column("Judged by", [_evaluation(here, one, digest) for one in about.evaluations[:MOST]]),
        Column("Answered", [_span(here, one) for one in about.spans[:MOST]]),
    ]
    requests = sum(answered.by_origin.values())
    told = f"{len(about.evaluations)} evaluations, {len(about.spans)} times in service, {requests:,} requests answered"
    return lay_out(columns, _edges(columns), told, width=WIDTH, box_width=BOX_WIDTH)


def _edges(columns: list[Column]) -> list[tuple[Place, Place]]:
    middle = Place(2, 0)
    taught = Place(1, 0) if columns[1].nodes else middle
    first = [(Place(0, row), taught) for row in range(len(columns[0].nodes))]
    first += [(taught, middle)] if columns[1].nodes else []
    judged = [(middle, Place(3, row)) for row in range(len(columns[3].nodes))]
    after = Place(3, 0) if columns[3].nodes else middle
    return first + judged + [(after, Place(4, row)) for row in range(len(columns[4].nodes))]


def _source(here: str, about: About) -> Node:
    if about.revision is None or about.dataset is None:
        said = "the log" if about.artifact.kind == "speculator" else "not known"
        return Node(said, "logged answers" if said == "the log" else "made elsewhere")
    href = f"{here}/datasets/{about.dataset.name}/{about.revision.digest}"
    return Node(f"{about.dataset.name} {about.revision.digest[:8]}", f"{about.revision.train_count:,} to train", href)


def _replayed(about: About) -> list[Node]:
    count = about.replayed
    return [Node("older examples", f"{count:,} replayed")] if count else []


def _run(here: str, about: About) -> Node:
    assert about.run is not None
    mood = "bad" if about.run.state == "failed" else ""
    return Node(f"{about.run.kind} run", about.run.phase, f"{here}/runs/{about.run.id}", mood)


def _evaluation(here: str, one: Evaluation, digest: str) -> Node:
    if one.candidate_digest != digest:
        return Node("stood its ground" if one.decision == "refuse" else "was beaten", f"by {one.candidate_digest[:10]}",
                    f"{here}/evaluations/{one.id}")  # fmt: skip
    said = {"promote": "passed the gate", "refuse": "refused"}.get(one.decision, one.decision)
    against = f"against {one.baseline_digest[:10]}" if one.baseline_digest else "against the base"
    return Node(said, against, f"{here}/evaluations/{one.id}", "bad" if one.decision == "refuse" else "")


def _span(here: str, span: Span) -> Node:
    when = f"since {span.since:%d %b %H:%M}" if span.until is None else f"{span.since:%d %b} to {span.until:%d %b}"
    mood = "live" if span.until is None and span.how == "live" else "bad" if span.ended_by == "roll_back" else ""
    return Node(f"{span.how}, generation {span.generation}", when, f"{here}/deployment", mood)
