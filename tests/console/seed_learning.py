"""A project that has learned several times: held-out sets, evaluations on them, and weights that went live."""

import random
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import update
from sqlalchemy.orm import Session

from services.store import datasets, deployments, evaluations, examples, revisions
from services.store.models import Artifact, DeploymentEvent, Evaluation, EvaluationRow, Example, Project, Revision, Run
from tests.console.seed import BASE


class Held(NamedTuple):
    """A golden row, as revisions list it and as the table holds it."""

    entry: examples.Entry
    example: Example


def held_out(session: Session, project: Project, size: int, *, name: str = "held", groups: int = 0) -> list[Held]:
    """Golden rows, in so many groups (each its own when 0)."""
    drafts = [
        examples.Draft(
            kind="completion", source="corrected", split="held_out", slice="target",
            group_key=f"{name}-{place % groups if groups else place}",
            messages=[{"role": "user", "content": f"{name} {place}"}], completion="right", rejected="wrong",
            interaction_id=None, annotation_ids=(), reviewers=(),
        )
        for place in range(size)
    ]  # fmt: skip
    entries = examples.add_examples(session, project.id, drafts)
    return [Held(entry, session.get_one(Example, entry.example_id)) for entry in entries]


def revision(session: Session, project: Project, rows: Sequence[Held]) -> Revision:
    """An immutable state of the golden dataset that holds these rows."""
    golden = datasets.get_or_create(session, project.id, "golden")
    return revisions.create(session, golden, [row.entry for row in rows], {})


def learned(
    session: Session,
    project: Project,
    rows: Sequence[Held],
    *,
    share: float,
    before: float,
    at: datetime,
    digest: str | None = None,
    metric: str = "exact_match",
    base_digest: str = BASE,
    dice: random.Random | None = None,
) -> Evaluation:
    """Weights that got `share` of the rows right, where what served got `before`, and that went live `at`."""
    drawn = dice or random.Random(len(rows) + int(1000 * share))
    held = revision(session, project, rows)
    digest = digest or uuid.uuid4().hex * 2
    run = Run(
        project_id=project.id, kind="sft", state="succeeded", phase="live", params={}, revision_id=held.id,
        created_by="test",
    )  # fmt: skip
    session.add(run)
    session.flush()
    session.add(
        Artifact(digest=digest, kind="adapter", project_id=project.id, run_id=run.id, base_digest=base_digest,
                 manifest={}, state="staged", created_at=at)
    )  # fmt: skip
    session.flush()
    run.artifact_digest = digest
    now = deployments.create(session, project.id)
    evaluation = evaluations.create(
        session, run, revision_id=held.id, candidate_digest=digest, baseline_digest=now.active_digest
    )
    made = [_row(evaluation, one.example, metric, drawn.random() < before, drawn.random() < share) for one in rows]
    evaluations.decide(session, evaluation, made, decision="promote", reasons=[], summary={"metric": metric})
    evaluation.created_at = at
    deployments.flip(
        session, project.id, expected_generation=now.generation, digest=digest, actor="rollout", reason="passed"
    )
    dated(session, project, at)
    return evaluation


def _row(evaluation: Evaluation, example: Example, metric: str, base: bool, ours: bool) -> EvaluationRow:
    return EvaluationRow(
        evaluation_id=evaluation.id, example_id=example.id, slice=example.slice, group_key=example.group_key,
        baseline_output="", candidate_output="", baseline_scores={metric: float(base)},
        candidate_scores={metric: float(ours)},
    )  # fmt: skip


def dated(session: Session, project: Project, at: datetime) -> None:
    """Put the newest change at a moment of the past."""
    newest = deployments.events(session, project.id, limit=1)[0].id
    session.execute(update(DeploymentEvent).where(DeploymentEvent.id == newest).values(at=at))
    session.expire_all()
