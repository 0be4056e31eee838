"""Runs of every kind at every stage, for the run pages: a sweep at work, a run that failed, one that was resumed."""

import math
import random
from datetime import UTC, datetime, timedelta

from sqlalchemy import update
from sqlalchemy.orm import Session

from services.store import runs
from services.store.models import Project, Revision, Run, RunEvent

TRIALS = (
    (0, 0, {}, 25, 0.62, 0.81, True), (1, 0, {"lr": 0.002}, 25, 0.55, 0.84, True),
    (2, 0, {"beta": 0.03}, 25, 0.71, 0.74, False), (3, 0, {"lr": 0.004, "epochs": 8.0}, 50, 0.93, 0.69, False),
    (0, 1, {}, 50, 0.44, 0.9, False), (1, 1, {"lr": 0.002}, 50, 0.38, 0.93, True),
)  # fmt: skip
PREFLIGHT = {
    "verdict": "ok", "reasons": [], "rows": 212, "rows_trained": 208, "not_for_this_kind": 31,
    "refused": {"both answers of the pair are the same": 3, "the answer would be truncated": 1}, "no_label": 0,
    "max_length": 1024, "longest_row": 233,
    "supervised_tokens": {
        "sum": 9120, "least": 18, "most": 141, "buckets": {"<=64": 162, "<=32": 21, "<=128": 22, "<=256": 3},
    },
    "template": {"equal_to_served": 207, "served_under_another": 1, "masked": 0, "different": []},
    "leakage": {"prompts": 0, "groups": 0},
    "replay": {"wanted": 23, "drawn": 23, "share": 0.0995, "from": ""},
}  # fmt: skip


def at_work(session: Session, project: Project, revision: Revision) -> Run:
    """A preference run in the middle of its training, after a sweep and a kill."""
    dice = random.Random(5)
    run = runs.start(
        session, project, params={"sweep": 4}, created_by="cadence", kind="dpo", revision=revision,
        trigger={"line": "300 answers were reviewed since the last run"},
    )  # fmt: skip
    for phase in ("building the revision", "checking", "training"):
        runs.enter_phase(session, run, phase)
    run.preflight = PREFLIGHT
    for candidate, rung, changes, steps, loss, preferred, kept in TRIALS:
        told = {
            "candidate": candidate, "rung": rung, "changes": changes, "steps": steps, "loss": loss,
            "preferred": preferred, "kept": kept,
        }  # fmt: skip
        runs.add_event(session, run.id, "trial", told)
    for place, step in enumerate((*range(1, 31), *range(26, 61))):
        if place == 30:
            detail = {"checkpoint": "checkpoint-25"}
            runs.add_event(session, run.id, "log", {"name": "resumed", "detail": detail})
        margin = 4 * (1 - math.exp(-step / 30)) + dice.uniform(-0.2, 0.2)
        runs.add_event(
            session, run.id, "progress",
            {
                "steps": 104, "loss": 0.2 + 0.9 * 0.96**step, "lr": 1e-3 * min(step / 6, (105 - step) / 99),
                "grad_norm": 1.4 + dice.uniform(0, 0.5), "tokens_per_second": dice.uniform(3900, 4300),
                "memory_mb": 731.0 + step / 10, "margin": margin, "preferred": min(1.0, 0.6 + step / 120), "kl": None,
                "accuracy": 0.9, "eta": (104 - step) * 0.6,
            },
            step=step,
        )  # fmt: skip
        if step % 13 == 0:
            told = {"step": step, "loss": 0.3 + 0.5 * 0.95**step, "preferred": min(0.97, 0.7 + step / 200)}
            runs.add_event(session, run.id, "validation", told, step=step)
    _began(session, run, seconds=(140, 128, 121, 88))
    return run


def broken(session: Session, project: Project, revision: Revision) -> Run:
    """A run that the preflight refused."""
    run = runs.start(session, project, params={}, created_by="lead@example.org", kind="kto", revision=revision)
    runs.enter_phase(session, run, "checking")
    reason = "leak of held-out rows: 3 prompts and 1 groups are on both sides of the split"
    run.preflight = PREFLIGHT | {"verdict": "refused", "reasons": [reason], "leakage": {"prompts": 3, "groups": 1}}
    run.preflight |= {"marked": {"right": 131, "wrong": 77}}
    runs.finish(session, run, "failed", "failed", f"preflight refused the run: {reason}")
    return run


def _began(session: Session, run: Run, seconds: tuple[int, ...]) -> None:
    """The phases began so many seconds ago."""
    now = datetime.now(UTC)
    phases = [event for event in runs.events(session, run.id) if event.kind == "phase"]
    for event, ago in zip(phases, seconds, strict=True):
        moment = now - timedelta(seconds=ago)
        session.execute(update(RunEvent).where(RunEvent.id == event.id).values(at=moment))
    run.created_at = run.started_at = now - timedelta(seconds=seconds[0])
    session.flush()
