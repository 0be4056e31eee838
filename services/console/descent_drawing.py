"""An interaction's lineage as a drawing: from the answer over its judgements to the weights it taught, and theirs."""

from collections.abc import Iterable, Sequence

from services.console.graph import Column, Drawing, Node, Place, lay_out
from services.console.wording import SPLITS, VERDICTS
from services.store.descent import Descent, part, taught
from services.store.models import Artifact, Evaluation, Run
from services.store.served import Span

WIDTH, BOX_WIDTH = 1040, 130
MOST = 6  # nodes of a column; what is beyond is one node that counts

Edges = list[tuple[Place, Place]]


def draw(slug: str, found: Descent, *, blind: bool) -> Drawing:
    """Who is about to judge the answer is shown neither why it was chosen nor what came of it."""
    here = f"/p/{slug}"
    columns = [Column("Answer", [_answer(here, found)])]
    if blind:
        columns.append(Column("Review", [Node("in review", "told once judged", mood="here")]))
        told = "an answer that you are about to judge"
        return lay_out(columns, [(Place(0, 0), Place(1, 0))], told, width=WIDTH, box_width=BOX_WIDTH)
    columns += [
        Column("Review", _review(found)),
        Column("Examples", [Node(SPLITS[one.split], one.source) for one in found.examples[:MOST]]),
        Column("Revisions", _revisions(here, found)),
        Column("Runs", [_run(here, found, one) for one in found.runs[:MOST]]),
        Column("Weights", [_weights(here, one) for one in found.artifacts[:MOST]]),
        Column("Judged, served", [*_evaluations(here, found), *_spans(here, found)]),
    ]
    return lay_out(columns, _edges(columns, found), in_words(found), width=WIDTH, box_width=BOX_WIDTH)


def in_words(found: Descent) -> str:
    """The picture in a sentence."""
    learned = sum(taught(found, run) for run in found.runs)
    replayed = sum(part(found, run) == "replayed" for run in found.runs)
    again = f" ({replayed} replayed it)" if replayed else ""
    return (
        f"{len(found.judgements)} judgements, {len(found.examples)} examples in {found.copies_in_all} revisions, "
        f"{learned} runs that learned from it{again}, {len(found.artifacts)} artefacts, "
        f"{len(found.evaluations)} evaluations"
    )


def _answer(here: str, found: Descent) -> Node:
    by = (found.interaction.adapter_digest or "the base")[:8] if found.interaction.adapter_digest else "the base"
    return Node(f"by {by}", f"generation {found.interaction.generation}", _interaction(here, found), "here")


def _interaction(here: str, found: Descent) -> str:
    return f"{here}/interactions/{found.interaction.id}"


def _review(found: Descent) -> list[Node]:
    if found.item is None:
        return []
    said = [one for one in found.judgements if one.stands and one.annotation.verdict != "undo"]
    nodes = [Node("chosen", f"{found.item.state}, {SPLITS[found.item.split]}")]
    return nodes + [
        Node(VERDICTS.get(one.annotation.verdict, one.annotation.verdict), f"by {one.author}") for one in said[:MOST]
    ]


def _revisions(here: str, found: Descent) -> list[Node]:
    nodes = [
        Node(
            copy.revision.digest[:8], f"{copy.dataset}, {SPLITS[copy.split]}",
            f"{here}/datasets/{copy.dataset}/{copy.revision.digest}",
        )
        for copy in found.copies[:MOST]
    ]  # fmt: skip
    rest = found.copies_in_all - len(nodes)
    return [*nodes, Node(f"{rest} more", "hold it too")] if rest > 0 else nodes


def _run(here: str, found: Descent, run: Run) -> Node:
    return Node(f"{run.kind} run", f"{part(found, run)}: {run.phase}", f"{here}/runs/{run.id}", _mood_of_run(run))


def _mood_of_run(run: Run) -> str:
    return "bad" if run.state == "failed" else ""


def _weights(here: str, artifact: Artifact) -> Node:
    state = "tainted" if artifact.tainted_at else artifact.state.replace("_", " ")
    mood = "live" if artifact.state == "live" else "bad" if artifact.tainted_at else ""
    return Node(artifact.digest[:10], state, f"{here}/artifacts/{artifact.digest}", mood)


def _evaluations(here: str, found: Descent) -> list[Node]:
    return [
        Node(
            {"promote": "passed the gate", "refuse": "refused"}.get(one.decision, one.decision),
            "tested with it" if one.id in found.tested else "its weights", f"{here}/evaluations/{one.id}",
        )
        for one in found.evaluations[:MOST]
    ]  # fmt: skip


def _spans(here: str, found: Descent) -> list[Node]:
    return [
        Node(
            f"{span.how}, gen. {span.generation}",
            "now" if span.until is None else f"to {span.until:%d %b %H:%M}", f"{here}/deployment",
            "live" if span.until is None and span.how == "live" else "",
        )
        for span in found.spans[:MOST]
    ]  # fmt: skip


# --- edges ------------------------------------------------------------------------------------------------


def _edges(columns: Sequence[Column], found: Descent) -> Edges:
    review, revisions = columns[1].nodes, found.copies[:MOST]
    edges = [(Place(0, 0), Place(1, 0))] if review else []
    edges += [(Place(1, row - 1), Place(1, row)) for row in range(1, len(review))]
    source = Place(1, 0) if review else Place(0, 0)
    edges += [(source, Place(2, row)) for row in range(len(columns[2].nodes))]
    examples = {one.id: row for row, one in enumerate(found.examples[:MOST])}
    edges += [
        (Place(2, examples[copy.example_id]), Place(3, row))
        for row, copy in enumerate(revisions) if copy.example_id in examples
    ]  # fmt: skip
    edges += _of_runs(found)
    return edges + list(_of_ends(found))


def _of_runs(found: Descent) -> Edges:
    rows = {copy.revision.id: row for row, copy in enumerate(found.copies[:MOST])}
    examples = {one.id: row for row, one in enumerate(found.examples[:MOST])}
    weights = {one.digest: row for row, one in enumerate(found.artifacts[:MOST])}
    edges: Edges = []
    for row, run in enumerate(found.runs[:MOST]):
        if run.revision_id in rows:
            edges.append((Place(3, rows[run.revision_id]), Place(4, row)))
        # No revision brought what is replayed: its line runs past them.
        again = [one.example_id for one in found.replays if one.run.id == run.id]
        edges += [(Place(2, examples[one]), Place(4, row)) for one in again if one in examples]
        if run.artifact_digest in weights:
            edges.append((Place(4, row), Place(5, weights[run.artifact_digest])))
    return edges


def _of_ends(found: Descent) -> Iterable[tuple[Place, Place]]:
    weights = {one.digest: row for row, one in enumerate(found.artifacts[:MOST])}
    ends: list[Evaluation | Span] = [*found.evaluations[:MOST], *found.spans[:MOST]]
    for row, end in enumerate(ends):
        digest = end.candidate_digest if isinstance(end, Evaluation) else end.digest
        if digest is not None and digest in weights:
            yield Place(5, weights[digest]), Place(6, row)
