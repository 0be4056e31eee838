"""A project that has learned several times: held-out sets, evaluations on them, and weights that went live."""

import random
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import update
from sqlalchemy.orm import Session

from services.store import datasets, deployments, evaluations, examples, revisions, webhook_deliveries, webhooks
from services.store.base import uuid7
from services.store.models import (
    Annotation,
    Artifact,
    DeploymentEvent,
    Evaluation,
    EvaluationRow,
    Example,
    Project,
    ReviewItem,
    Revision,
    Run,
    Webhook,
)
from services.store.webhook_deliveries import Outcome
from tests.console import seed
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


def judged(session: Session, project: Project, at: datetime, right: int, wrong: int) -> None:
    """A closed window of an audit."""
    window = f"{at:%Y-%m-%dT%H:%M:%SZ}/{at + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    person = seed.person(session, "judge@example.org", "reviewer", project.id).user
    for place in range(right + wrong):
        identity = uuid7(at.timestamp())
        item = ReviewItem(
            project_id=project.id, interaction_id=identity, strategy="uniform", window=window, stratum_size=500,
            probability=0.1, priority=0, order_hash=str(identity), split="train", group_key=str(identity), state="done",
        )  # fmt: skip
        session.add(item)
        session.flush()
        session.add(
            Annotation(
                project_id=project.id, review_item_id=item.id, interaction_id=identity, author_id=person.id,
                idempotency_key=str(identity), verdict="accept" if place < right else "reject", tags=[],
                created_at=at + timedelta(hours=2),
            )
        )  # fmt: skip
    session.flush()


def experienced(session: Session, slug: str = "learned", name: str = "Ledger entries") -> Project:
    """A project that has learned, gone back and learned again, whose answers are right less often of late."""
    project, now = seed.project(session, slug, name), datetime.now(UTC)
    first = held_out(session, project, 240, name=slug)
    learned(session, project, first, share=0.46, before=0.08, at=now - timedelta(days=40))
    learned(session, project, first, share=0.71, before=0.46, at=now - timedelta(days=33))
    more = [*first, *held_out(session, project, 90, name=f"{slug} more")]
    learned(session, project, more, share=0.66, before=0.71, at=now - timedelta(days=28))
    deployments.roll_back(session, project.id, actor="lead@example.org", reason="worse on dates")
    dated(session, project, now - timedelta(days=27))
    learned(session, project, more, share=0.83, before=0.71, at=now - timedelta(days=20))
    judged(session, project, now - timedelta(days=18), 92, 8)
    judged(session, project, now - timedelta(days=1), 58, 42)
    return project


def told(session: Session, project: Project) -> list[Webhook]:
    """Two webhooks: one with every sort of delivery, one disabled."""
    first, second = (
        webhooks.create(session, project, url=url, events=list(webhooks.EVENTS), actor="user:1")
        for url in ("https://hooks.chat.example/services/T0/B1/abcdef", "https://ci.example/whet")
    )
    back = {"said": "worse on dates", "generation": 4, "kind": "roll_back", "from_digest": None, "to_digest": None}
    events = [
        ("run.finished", {"said": "The sft run has ended: live."}, Outcome(204, None, 84.0)),
        ("gate.decided", {"said": "The candidate was refused: what serves stays."}, Outcome(503, "answered 503", 41.0)),
        ("deployment.rolled_back", back, Outcome(None, "hooks.chat.example did not answer in time", 10_000.0)),
    ]
    for place, (event, payload, outcome) in enumerate(events):
        delivery = webhook_deliveries.send(session, first, event, {"project": project.slug, **payload})
        delivery.attempts = webhook_deliveries.TRIES - 1 if place == 2 else 0
        webhook_deliveries.record(session, delivery.id, delivery.job_id, outcome)
    webhook_deliveries.send(
        session, first, "run.finished", {"project": project.slug, "said": "The dpo run was cancelled."}
    )
    webhooks.disable(session, project.id, second.id, "user:1", "the build system has moved")
    return [first, second]
