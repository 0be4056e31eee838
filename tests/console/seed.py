"""Rows a console has something to show with, made by the store's own functions where there are some."""

import random
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS, review
from services.store import (
    datasets,
    deployments,
    evaluations,
    examples,
    partitions,
    people,
    projects,
    reviews,
    revisions,
    runs,
)
from services.store.base import uuid7
from services.store.models import (
    Artifact,
    Evaluation,
    EvaluationRow,
    Feedback,
    Interaction,
    InteractionBody,
    Project,
    ReviewItem,
    Revision,
    Run,
    UserAccount,
)

BASE = "b" * 64
TAGS = ["wrong kind", "missing entity", "date not split out", "bad JSON"]
GUIDELINES = (
    "List every entity once, in the order of the text.\n\n"
    "Dates have a key of their own, in ISO form: 04 March 2021 is 2021-03-04.\n"
    "An event is not an organisation."
)


class Person(NamedTuple):
    """Somebody who can sign in."""

    user: UserAccount
    token: str


def project(session: Session, slug: str = "entities", name: str = "Named entities", **config: object) -> Project:
    """A project with tags and guidelines."""
    return projects.create(session, slug, name, config={"tags": TAGS, "guidelines": GUIDELINES} | config)


def person(session: Session, email: str, role: str | None, project_id: uuid.UUID | None = None) -> Person:
    """An account with a role and a sign-in link."""
    user = people.create_user(session, email=email, name=email.split("@")[0].capitalize())
    if role is not None:
        people.grant(session, user.id, role, project_id)
    return Person(user, people.make_sign_in_link(session, user.id))


def interaction(
    session: Session,
    project_id: uuid.UUID,
    *,
    output: str,
    messages: list[dict[str, Any]] | None = None,
    ago: timedelta = timedelta(),
    digest: str | None = None,
    parameters: dict[str, object] | None = None,
    **values: object,
) -> Interaction:
    """One logged answer, `ago` before now."""
    started = datetime.now(UTC) - ago
    identity = uuid7(started.timestamp())
    row = {
        "origin": "live", "base_digest": BASE, "generation": 1, "namespace": str(project_id),
        "endpoint": "/v1/chat/completions", "stream": True, "finish_reason": "stop", "prompt_tokens": 84,
        "completion_tokens": max(1, len(output) // 4), "cached_tokens": 0, "drafted_tokens": 0, "accepted_tokens": 0,
        "ttft_ms": 21.5, "latency_ms": 143.0, "longest_gap_ms": 9.1, "mean_logprob": -0.21, "min_logprob": -2.4,
        "group_key": str(identity), "config_hash": "c" * 64, "started_at": started,
        "finished_at": started + timedelta(seconds=0.14),
    }  # fmt: skip
    made = Interaction(id=identity, project_id=project_id, adapter_digest=digest, **(row | values))
    session.add(made)
    session.add(
        InteractionBody(
            id=identity, messages=messages or [{"role": "user", "content": "Text: Anna Reed was seen in Oslo."}],
            parameters={"temperature": 0.0, "max_tokens": 128} | (parameters or {}), output=output,
            prompt_token_ids=[], token_ids=[], token_logprobs=[],
            prompt_hash="p", template_hash="t", tokenizer_hash="k", spool_version=1,
        )
    )  # fmt: skip
    session.flush()
    return made


def item(session: Session, logged: Interaction, *, overlap: int = 1, priority: int = 0, **values: object) -> ReviewItem:
    """A place in the queue for an interaction."""
    row = {
        "strategy": "uniform", "window": "2026-01-01T00:00:00Z/2026-01-01T01:00:00Z", "stratum_size": 10,
        "order_hash": str(logged.id), "split": "held_out" if overlap > 1 else "train", "group_key": logged.group_key,
    }  # fmt: skip
    made = ReviewItem(
        project_id=logged.project_id, interaction_id=logged.id, overlap_target=overlap, priority=priority,
        **(row | values),
    )  # fmt: skip
    session.add(made)
    session.flush()
    return made


def queue(session: Session, project_id: uuid.UUID, outputs: Sequence[str], *, overlap: int = 1) -> list[ReviewItem]:
    """An item for each output, to be reviewed in this order."""
    return [
        item(session, interaction(session, project_id, output=output), overlap=overlap, priority=place)
        for place, output in enumerate(outputs)
    ]


# --- a lived-in project, for pages and screenshots --------------------------------------------------------


def lived_in(session: Session, app: str = "entities", name: str = "Named entities", *, size: int = 60) -> Project:
    """A project with traffic, feedback, judgements, a revision, a promoted and a refused run, and a swap."""
    partitions.ensure(session, since=datetime.now(UTC) - timedelta(days=1))
    made = project(session, app, name)
    dice = random.Random(7)
    reviewers = [person(session, f"{n}@example.org", "reviewer", made.id).user for n in ("ada", "grace", "edsger")]
    logged = _traffic(session, made, app, dice, size)
    judged = _judged(session, made, app, dice, logged, reviewers)
    revision = _revision(session, made, judged)
    _promoted(session, made, revision, dice)
    _refused(session, made, revision, dice)
    return made


def _traffic(
    session: Session, made: Project, app: str, dice: random.Random, size: int
) -> list[tuple[Interaction, list[dict[str, str]], str]]:
    examples = stream(APPLICATIONS[app], "train", 11)
    logged = []
    for index in range(size):
        example = next(examples)
        ago = timedelta(minutes=dice.uniform(0.2, 50) if index % 3 == 0 else dice.uniform(1, 180))
        finish = dice.choices(["stop", "length", "cancelled"], [90, 6, 4])[0]
        output = example.house if dice.random() < 0.2 else example.base
        row = interaction(
            session, made.id, output=output, messages=example.messages, ago=ago, finish_reason=finish,
            prompt_tokens=dice.randint(70, 140), latency_ms=dice.uniform(90, 480), ttft_ms=dice.uniform(12, 60),
            session_key=f"session-{dice.randint(1, 20)}", tags={"app": "newsroom"},
        )  # fmt: skip
        if dice.random() < 0.25:
            rating = dice.choice([-1, -1, 1])
            comment = "the date is in the wrong place" if rating < 0 else None
            session.add(
                Feedback(
                    project_id=made.id, interaction_id=row.id, idempotency_key=str(row.id), rating=rating,
                    comment=comment, author="desk",
                )
            )  # fmt: skip
        logged.append((row, example.messages, output))
    return logged


def _judged(
    session: Session,
    made: Project,
    app: str,
    dice: random.Random,
    logged: Sequence[tuple[Interaction, list[dict[str, str]], str]],
    reviewers: Sequence[UserAccount],
) -> list[examples.Draft]:
    drafts = []
    for index, (row, messages, output) in enumerate(logged):
        overlap = 2 if index % 4 == 0 else 1
        strategy = dice.choice(["negative_feedback", "low_confidence", "uniform"])
        item(session, row, overlap=overlap, priority=index, strategy=strategy, probability=0.4)
        if index >= len(logged) * 2 // 3:
            continue
        verdict, correction = review(app, messages, output)
        for reviewer in reviewers[:overlap]:
            [held] = reviews.lease(session, made.id, reviewer.id, 1)
            tags = ["date not split out"] if verdict == "correct" else []
            judgement = reviews.Judgement(
                verdict, str(uuid.uuid4()), correction=correction, tags=tags, active_ms=dice.randint(4000, 26000)
            )
            assert held.lease_token is not None
            reviews.submit(session, made.id, held.id, reviewer.id, held.lease_token, judgement)
        drafts.append(
            examples.Draft(
                kind="completion", source="corrected" if correction else "accepted",
                split="held_out" if overlap == 2 else "train", slice="target" if correction else "unchanged",
                group_key=row.group_key, messages=list(messages), completion=correction or output,
                rejected=output if correction else None, interaction_id=row.id, annotation_ids=(),
                reviewers=tuple(str(r.id) for r in reviewers[:overlap]),
            )
        )  # fmt: skip
    return drafts


def _revision(session: Session, made: Project, drafts: Sequence[examples.Draft]) -> Revision:
    golden = datasets.get_or_create(session, made.id, "golden")
    report = {"left_out": {"repeats another example": 3, "accepted beyond their share": 2}}
    first = examples.add_examples(session, made.id, drafts[: len(drafts) // 2])
    revisions.create(session, golden, first, report)
    return revisions.create(session, golden, examples.add_examples(session, made.id, drafts), report)


def _run(session: Session, made: Project, revision: Revision, dice: random.Random, *, digest: str, loss: float) -> Run:
    run = runs.start(session, made, params={}, created_by="lead@example.org", revision=revision)
    for phase in ("building the revision", "checking", "training"):
        runs.enter_phase(session, run, phase)
    for step in range(1, 61):
        value = 0.08 + loss * 0.93**step + dice.uniform(-0.02, 0.02)
        rate = 2e-3 * min(step / 6, (61 - step) / 55)
        progress = {"steps": 60, "loss": value, "lr": rate, "tokens_per_second": dice.uniform(5200, 6100)}
        runs.add_event(session, run.id, "progress", progress, step=step)
    runs.add_event(session, run.id, "log", {"line": "saved the adapter"})
    run.preflight = {
        "verdict": "ok", "reasons": [], "rows": 48, "rows_trained": 47,
        "refused": {"the answer would be truncated": 1}, "max_length": 1024, "longest_row": 233,
        "supervised_tokens": {"sum": 2210, "least": 21, "most": 88, "buckets": {"<=64": 40, "<=128": 7}},
        "template": {"compared": 47, "differing": 0}, "leakage": [],
    }  # fmt: skip
    artifact = Artifact(
        digest=digest, kind="adapter", project_id=made.id, run_id=run.id, base_digest=BASE, manifest={}, state="built"
    )
    session.add(artifact)
    session.flush()
    run.artifact_digest = digest
    runs.enter_phase(session, run, "evaluating")
    run.started_at = datetime.now(UTC) - timedelta(seconds=94)
    return run


def _evaluate(session: Session, run: Run, revision: Revision, dice: random.Random, *, share: float) -> Evaluation:
    evaluation = evaluations.create(
        session, run, revision_id=revision.id, candidate_digest=run.artifact_digest or "", baseline_digest=None
    )
    rows = []
    for member in revisions.members(session, revision.id, "held_out"):
        wanted, before = member.example.completion or "", member.example.rejected or member.example.completion or ""
        after = wanted if dice.random() < share else before
        rows.append(
            EvaluationRow(
                evaluation_id=evaluation.id, example_id=member.example.id, slice=member.example.slice,
                group_key=member.example.group_key, baseline_output=before, candidate_output=after,
                baseline_scores={"exact_match": float(before == wanted)},
                candidate_scores={"exact_match": float(after == wanted)},
            )
        )  # fmt: skip
    promote = share > 0.5
    target = {
        "rows": 212, "groups": 212, "baseline": 0.04, "candidate": 0.91 if promote else 0.06,
        "delta": 0.87 if promote else 0.02, "low": 0.82 if promote else -0.01, "high": 0.91 if promote else 0.05,
        "wins": 184, "ties": 27, "losses": 1, "spread": 0.3,
    }  # fmt: skip
    unchanged = target | {
        "rows": 118, "baseline": 0.97, "candidate": 0.98, "delta": 0.008, "low": -0.012, "high": 0.03, "wins": 2,
        "ties": 115, "losses": 1,
    }  # fmt: skip
    reasons = (
        ["better on what was corrected: +87.0 points [+82.0, +91.0] over 212 rows",
         "no worse on unchanged by more than 3 points: +0.8 points [-1.2, +3.0]"]
        if promote
        else ["not shown to be better on what was corrected: +2.0 points [-1.0, +5.0]"]
    )  # fmt: skip
    evaluations.decide(
        session, evaluation, rows, decision="promote" if promote else "refuse", reasons=reasons,
        summary={
            "metric": "exact_match", "rows": 330, "look": 1, "alpha": 0.025, "needed": None,
            "means": {"exact_match": {"baseline": 0.37, "candidate": 0.94}},
            "slices": {"target": target, "unchanged": unchanged},
        },
    )  # fmt: skip
    return evaluation


def _promoted(session: Session, made: Project, revision: Revision, dice: random.Random) -> None:
    run = _run(session, made, revision, dice, digest=uuid.uuid5(made.id, "good").hex * 2, loss=1.6)
    _evaluate(session, run, revision, dice, share=0.92)
    digest = run.artifact_digest or ""
    for state in ("verified", "staged"):
        deployments.advance(session, digest, state)
    runs.enter_phase(session, run, "staging")
    deployments.flip(
        session, made.id, expected_generation=1, digest=digest, actor="rollout",
        reason=f"run {run.id} passed the gate", evidence={"golden_prompts": 32, "differing": 0, "run_id": str(run.id)},
    )  # fmt: skip
    runs.finish(session, run, "succeeded", "live")
    messages = [{"role": "user", "content": "Note: Ivy Stone lives in Bergen."}]
    interaction(session, made.id, output='{"people": ["Ivy Stone"]}', messages=messages, digest=digest, generation=2)


def _refused(session: Session, made: Project, revision: Revision, dice: random.Random) -> None:
    run = _run(session, made, revision, dice, digest=uuid.uuid5(made.id, "bad").hex * 2, loss=0.9)
    _evaluate(session, run, revision, dice, share=0.05)
    runs.finish(session, run, "succeeded", "refused")
