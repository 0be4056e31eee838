"""What became of one interaction: judged, copied, trained on, tested with, and what those weights then did."""

from typing import Literal, NamedTuple
from uuid import UUID

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from services.store import browse, interactions, replay, served
from services.store.evaluation_config import RECORD
from services.store.models import (
    Artifact,
    Dataset,
    Evaluation,
    EvaluationRow,
    Example,
    Feedback,
    Interaction,
    ReviewItem,
    Revision,
    RevisionExample,
    Run,
)

# A golden example is in every later revision; what is beyond this is counted, not listed.
COPIES_MOST = 200
Part = Literal["taught", "replayed", "tested"]


class Copy(NamedTuple):
    """A revision that holds an example made from the interaction."""

    example_id: UUID
    dataset: str
    revision: Revision
    split: str


class Descent(NamedTuple):
    """Everything that came of an interaction, step by step. Newest first within a step, judgements oldest first.

    `tested` names the evaluations that used a copy of it; the others judged weights that it taught.
    `replays` are the runs that were given it again, beside what their own revision holds.
    """

    interaction: Interaction
    opinions: int
    item: ReviewItem | None
    judgements: list[browse.Judged]
    examples: list[Example]
    copies: list[Copy]
    copies_in_all: int
    runs: list[Run]
    replays: list[replay.Replayed]
    artifacts: list[Artifact]
    evaluations: list[Evaluation]
    tested: frozenset[UUID]
    spans: list[served.Span]


def trace(session: Session, project_id: UUID, interaction_id: UUID) -> Descent:
    """Raises NotFound for an interaction that is not this project's."""
    logged = interactions.get(session, project_id, interaction_id)
    examples = _examples(session, project_id, interaction_id)
    copies, in_all = _copies(session, [one.id for one in examples])
    replays = replay.replaying(session, project_id, interaction_id)
    runs = _runs(session, project_id, copies, replays)
    artifacts = _artifacts(session, [run.artifact_digest for run in runs if run.artifact_digest])
    evaluations, tested = _evaluations(session, project_id, examples, artifacts)
    made = {one.digest for one in artifacts}
    return Descent(
        interaction=logged.interaction,
        opinions=_opinions(session, project_id, interaction_id),
        item=browse.review_item(session, interaction_id),
        judgements=browse.judgements(session, interaction_id),
        examples=examples,
        copies=copies,
        copies_in_all=in_all,
        runs=runs,
        replays=replays,
        artifacts=artifacts,
        evaluations=evaluations,
        tested=tested,
        spans=[span for span in reversed(served.spans(session, project_id)) if span.digest in made],
    )


def taught(descent: Descent, run: Run) -> bool:
    """Whether a run learned from the interaction, rather than only being compared by it."""
    return part(descent, run) != "tested"


def part(descent: Descent, run: Run) -> Part:
    """What the interaction was to a run: a lesson of its revision, an older one replayed, or only a test."""
    if any(copy.revision.id == run.revision_id and copy.split == "train" for copy in descent.copies):
        return "taught"
    return "replayed" if any(one.run.id == run.id for one in descent.replays) else "tested"


def _opinions(session: Session, project_id: UUID, interaction_id: UUID) -> int:
    query = select(func.count()).where(Feedback.project_id == project_id, Feedback.interaction_id == interaction_id)
    return session.scalar(query) or 0


def _examples(session: Session, project_id: UUID, interaction_id: UUID) -> list[Example]:
    own = select(Example).where(Example.project_id == project_id, Example.interaction_id == interaction_id)
    return list(session.scalars(own.order_by(Example.id.desc())))


def _copies(session: Session, examples: list[UUID]) -> tuple[list[Copy], int]:
    """Revisions that were trained on come first: they are what the rest hangs on."""
    if not examples:
        return [], 0
    used = select(Run.id).where(Run.revision_id == Revision.id).exists()
    held = (
        select(RevisionExample.example_id, Dataset.name, Revision, RevisionExample.split)
        .join(Revision, Revision.id == RevisionExample.revision_id)
        .join(Dataset, Dataset.id == Revision.dataset_id)
        .where(RevisionExample.example_id.in_(examples))
    )
    in_all = session.scalar(select(func.count()).where(RevisionExample.example_id.in_(examples))) or 0
    rows = session.execute(held.order_by(case((used, 0), else_=1), Revision.id.desc()).limit(COPIES_MOST))
    return [Copy(*row) for row in rows], in_all


def _runs(session: Session, project_id: UUID, copies: list[Copy], replays: list[replay.Replayed]) -> list[Run]:
    """Those on a revision that holds it, and those that replayed it."""
    revisions = {copy.revision.id for copy in copies}
    wanted = select(Run).where(Run.project_id == project_id, Run.revision_id.in_(revisions))
    found = {one.run.id: one.run for one in replays}
    found |= {run.id: run for run in session.scalars(wanted)} if revisions else {}
    return sorted(found.values(), key=lambda run: run.id, reverse=True)


def _artifacts(session: Session, digests: list[str]) -> list[Artifact]:
    wanted = select(Artifact).where(Artifact.digest.in_(digests)).order_by(Artifact.created_at.desc())
    return list(session.scalars(wanted)) if digests else []


def _evaluations(
    session: Session, project_id: UUID, examples: list[Example], artifacts: list[Artifact]
) -> tuple[list[Evaluation], frozenset[UUID]]:
    """Those that tested with a copy, and those of weights that it taught."""
    ids, made = [one.id for one in examples], [one.digest for one in artifacts]
    with_it = select(EvaluationRow.evaluation_id).where(
        EvaluationRow.example_id.in_(ids), EvaluationRow.slice != RECORD
    )
    tested = frozenset(session.scalars(with_it)) if ids else frozenset[UUID]()
    if not tested and not made:
        return [], tested
    wanted = select(Evaluation).where(
        Evaluation.project_id == project_id,
        Evaluation.decision != "undecided",
        Evaluation.id.in_(tested) | Evaluation.candidate_digest.in_(made),
    )
    return list(session.scalars(wanted.order_by(Evaluation.id.desc()).limit(COPIES_MOST))), tested
