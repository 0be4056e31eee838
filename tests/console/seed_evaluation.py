"""An evaluation with something in every corner of its page: slices, checks, a judge, people's verdicts, four looks."""

import random
import uuid
from itertools import islice
from typing import Any

from sqlalchemy.orm import Session

from examples.grammars.common import Example, stream
from examples.grammars.simulate import APPLICATIONS
from services.store import base_ability, datasets, deployments, evaluations, examples, revisions, runs
from services.store.evaluation_config import BASE_ABILITY
from services.store.models import Artifact, Evaluation, EvaluationRow, Project, Revision, Run
from tests.console import seed
from worker.gate.decide import ScoredRow, decide

# Rows, and how often the incumbent is right.
SLICES = {"target": (90, 0.05), "accepted": (70, 0.97), BASE_ABILITY: (40, 0.97)}
# What each candidate adds to the target in truth.
GAINS = (0.02, 0.1, 0.75, 0.09)


def compared(session: Session, project: Project) -> list[Evaluation]:
    """One evaluation after the other on one held-out part; the last one has a refusal that nobody has overridden."""
    dice = random.Random(5)
    golden = datasets.get_or_create(session, project.id, "golden")
    drafts = [draft for name in ("target", "accepted") for draft in _drafts(name, dice)]
    revision = revisions.create(session, golden, examples.add_examples(session, project.id, drafts), {})
    other = datasets.get_or_create(session, project.id, base_ability.NAME)
    general = examples.add_examples(session, project.id, _drafts(BASE_ABILITY, dice))
    shown = revisions.create(session, other, general, {})
    return [_compare(session, project, revision, shown, gain, dice) for gain in GAINS]


def _drafts(name: str, dice: random.Random) -> list[examples.Draft]:
    app = "chat" if name == BASE_ABILITY else "entities"
    examples = stream(APPLICATIONS[app], "held_out", 3)
    return [_draft(name, example, dice) for example in islice(examples, SLICES[name][0])]


def _draft(name: str, example: Example, dice: random.Random) -> examples.Draft:
    wanted = example.house if name == "target" else example.base
    return examples.Draft(
        kind="completion", source="accepted" if name == "accepted" else "corrected", split="held_out", slice=name,
        group_key=f"{name}-{dice.randint(1, 60)}", messages=example.messages, completion=wanted,
        rejected=example.base if name == "target" else None, interaction_id=None, annotation_ids=(),
        reviewers=("a", "b"),
    )  # fmt: skip


def _run(session: Session, project: Project, revision: Revision) -> Run:
    run = runs.start(session, project, params={}, created_by="lead@example.org", revision=revision)
    digest = uuid.uuid4().hex * 2
    artifact = Artifact(
        digest=digest, kind="adapter", project_id=project.id, run_id=run.id, base_digest=seed.BASE, manifest={},
        state="built",
    )  # fmt: skip
    session.add(artifact)
    session.flush()
    run.artifact_digest = digest
    runs.enter_phase(session, run, "evaluating")
    return run


def _compare(
    session: Session, project: Project, revision: Revision, general: Revision, gain: float, dice: random.Random
) -> Evaluation:
    run = _run(session, project, revision)
    evaluation = evaluations.create(
        session, run, revision_id=revision.id, candidate_digest=run.artifact_digest or "",
        baseline_digest=deployments.create(session, project.id).active_digest,
    )  # fmt: skip
    members = [*revisions.members(session, revision.id, "held_out"), *revisions.members(session, general.id)]
    rows = [_row(evaluation, member.example, gain, dice) for member in members]
    looks = revisions.lock_looks(session, revision.id)
    table = [
        ScoredRow(row.slice, row.group_key, row.baseline_scores["exact_match"], row.candidate_scores["exact_match"])
        for row in rows
    ]
    decision = decide(table, look=looks.taken + 1, carried=looks.carry)
    evaluations.decide(
        session, evaluation, rows, decision="promote" if decision.promote else "refuse", reasons=decision.reasons,
        summary=decision.summary() | _told(rows), tested=decision.tested, carry=decision.carry,
    )  # fmt: skip
    deployments.advance(session, evaluation.candidate_digest, "verified" if decision.promote else "rejected")
    runs.finish(session, run, "succeeded", "live" if decision.promote else "refused")
    return evaluation


def _row(evaluation: Evaluation, example: Any, gain: float, dice: random.Random) -> EvaluationRow:  # noqa: ANN401 - a row
    _, before = SLICES[example.slice]
    after = min(1.0, before + gain) if example.slice == "target" else before
    right = (dice.random() < before, dice.random() < after)
    wrong = example.rejected or (example.completion or "").replace(",", ";", 2)
    outputs = [example.completion or "" if good else wrong for good in right]
    sources = ["people" if dice.random() < 0.2 else "exact_match", "exact_match"]
    if example.slice == BASE_ABILITY:
        sources = ["similarity", "similarity"]
    details: dict[str, Any] = {
        side: {"source": source, "finish": "stop", "tokens": len(output) // 4, "refused": False}
        for side, source, output in zip(("baseline", "candidate"), sources, outputs, strict=True)
    }
    if right[0] != right[1] and example.slice != BASE_ABILITY:
        details["judge"] = dice.choice(["win" if right[1] else "loss", "win" if right[1] else "loss", "inconsistent"])
    scores = [{"exact_match": float(good), "check:no semicolons": float(good)} for good in right]
    return EvaluationRow(
        evaluation_id=evaluation.id, example_id=example.id, slice=example.slice, group_key=example.group_key,
        baseline_output=outputs[0], candidate_output=outputs[1], baseline_scores=scores[0],
        candidate_scores=scores[1], details=details,
    )  # fmt: skip


def _told(rows: list[EvaluationRow]) -> dict[str, Any]:
    own = [row for row in rows if row.slice != BASE_ABILITY]
    answers = {"tokens": 41.5, "cut_off": 0.01, "failed": 0.0, "refused": 0.0}
    return {
        "metric": "exact_match",
        "rows": len(rows),
        "means": {
            name: {
                "baseline": sum(row.baseline_scores[name] for row in own) / len(own),
                "candidate": sum(row.candidate_scores[name] for row in own) / len(own),
            }
            for name in ("exact_match", "check:no semicolons")
        },
        "sources": {"baseline": {"people": 34, "exact_match": 126}, "candidate": {"exact_match": 160}},
        "answers": {"baseline": answers, "candidate": answers | {"tokens": 44.0}},
        "judge": {
            "model": "base", "outcomes": {"win": 21, "loss": 4, "tie": 108, "inconsistent": 27},
            "agreement": {"rows": 24, "same": 17, "kappa": 0.46},
        },
    }  # fmt: skip
