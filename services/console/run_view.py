"""A run as its page shows it: steps taken, curves, the preflight's findings, the gate's decision and its rows."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from services.console import charts, run_charts, run_form
from services.store import evaluations, revisions, runs
from services.store.gate_words import headline
from services.store.models import Artifact, Dataset, Evaluation, EvaluationRow, Project, Revision, Run, RunEvent

# What became of the candidate of a run that is over: on trial still, or taken back.
TRYING = ("shadow", "canary")
TAKEN_BACK = ("rolled back", "rejected")
# The path of a run that succeeds, and the words in `run.phase` that belong to each step.
STEPS: Mapping[str, tuple[str, ...]] = {
    "Queued": ("queued",),
    "Build": ("building",),
    "Preflight": ("checking",),
    "Train": ("training",),
    "Evaluate": ("evaluating", "refused"),
    "Deploy": ("deploying", "staging", "quarantined", "superseded", runs.WAITING),
    "Try": (*TRYING, "stopped", *TAKEN_BACK),
    "Live": ("live",),
}
# The same for heads, which learn from the log and are compared on held-out requests of it.
HEAD_STEPS: Mapping[str, tuple[str, ...]] = {
    "Queued": ("queued",),
    "Read the log": ("reading", "checking", "loading", "preparing"),
    "Train": ("training",),
    "Judge": ("judging", "evaluating", "comparing", "refused"),
    "Try": ("deploying", "staging", "canary", "trying", "quarantined", "superseded"),
    "Live": ("live",),
}
TARGET = "target"
MARGIN_POINTS = 3
EVENT_LIMIT = 5000
ROW_LIMIT = 8
LOG_LINES = 40


class Step(NamedTuple):
    """One step of a run's path. `state` is done, now, failed, or ahead."""

    name: str
    state: str
    at: datetime | None


class Score(NamedTuple):
    """The deciding metric on one slice under both, with the interval of the difference. Shares, not percentages."""

    slice: str
    rows: int
    baseline: float
    candidate: float
    delta: float
    low: float
    high: float


class Outcomes(NamedTuple):
    """How many held-out rows the candidate won, tied and lost."""

    win: int
    tie: int
    loss: int


def describe(session: Session, run: Run, show: str = "") -> dict[str, Any]:
    """Everything the run's templates use. `show` narrows the rows to win, tie or loss."""
    events = runs.events(session, run.id, limit=EVENT_LIMIT)
    evaluation = evaluations.of_run(session, run.id)
    revision = session.get(Revision, run.revision_id) if run.revision_id else None
    scores = _scores(evaluation)
    trials = run_charts.trial_rows(events)
    margin = float(session.get_one(Project, run.project_id).config.get("margin_points", MARGIN_POINTS)) / 100
    return {
        "run": run,
        "active": run.state in runs.UNFINISHED,
        "on_trial": _on_trial(run),
        "steps": _steps(run, events),
        "curves": run_charts.curves(events),
        "timeline": run_charts.timeline(events, run.finished_at or datetime.now(UTC)),
        "params": run_form.ordered(run.kind, run.params),
        "trials": trials,
        "trial_plot": run_charts.trial_plot(trials),
        "trigger": next((event.payload for event in events if event.kind == "trigger"), {}),
        "evaluated": next((event.payload for event in reversed(events) if event.kind == "evaluating"), None),
        "teaches": run_charts.histogram(((run.preflight or {}).get("supervised_tokens") or {}).get("buckets") or {}),
        "resumed": [event for event in events if event.kind == "log" and event.payload.get("name") == "resumed"],
        "latest": _latest(events),
        "gate": next((event.payload for event in reversed(events) if event.kind == "gate"), None),
        "logs": [event for event in events if event.kind == "log"][-LOG_LINES:],
        "revision": revision,
        "dataset": session.get(Dataset, revision.dataset_id) if revision else None,
        "counts": revisions.counts(session, revision.id) if revision else None,
        "artifact": session.get(Artifact, run.artifact_digest) if run.artifact_digest else None,
        "evaluation": evaluation,
        "headline": headline(evaluation) if evaluation else "",
        "scores": scores,
        "metric": evaluation.summary.get("metric", "exact_match") if evaluation else "",
        "means": evaluation.summary.get("means", {}) if evaluation else {},
        "plot": charts.forest([(score.delta, score.low, score.high) for score in scores], margin=-margin),
        "rows": evaluations.rows(session, evaluation.id, outcome=show or None, limit=ROW_LIMIT) if evaluation else [],
        "outcomes": _outcomes(evaluation),
        "outcome_of": outcome_of,
        "show": show,
    }


def step_of(phase: str, steps: Mapping[str, tuple[str, ...]] = STEPS) -> str | None:
    """Which step a phase's words belong to; endings like cancelled belong to none."""
    return next((name for name, words in steps.items() if any(phase.startswith(word) for word in words)), None)


def _steps(run: Run, events: Sequence[RunEvent]) -> list[Step]:
    path = HEAD_STEPS if run.kind == "speculator" else STEPS
    reached: dict[str, datetime] = {}
    for event in events:
        phase = str(event.payload.get("phase", "")) if event.kind == "phase" else ""
        name = step_of(phase, path)
        if phase in TRYING and "Live" in reached:
            # Weights that were live once and are tried again are on their way there anew.
            del reached["Live"]
            reached["Try"] = event.at
        # What else becomes of weights that were live is no step of their way there.
        elif name is not None and "Live" not in reached:
            reached.setdefault(name, event.at)
    # A project that swaps directly tries nothing.
    live = run.phase == "live" or "Live" in reached
    names = [name for name in path if name != "Try" or not live or name in reached]
    furthest = max((names.index(name) for name in reached), default=0)
    steps = []
    for index, name in enumerate(names):
        if index < furthest or run.phase == "live":
            state = "done"
        elif index > furthest:
            state = "ahead"
        else:
            state = _state_of(run)
        steps.append(Step(name, state, reached.get(name)))
    return steps


def _on_trial(run: Run) -> bool:
    return run.state == "succeeded" and run.phase in TRYING


def _state_of(run: Run) -> str:
    """How far the furthest step is."""
    waits = run.state == "succeeded" and run.phase == runs.WAITING
    if run.state in runs.UNFINISHED or _on_trial(run) or waits:
        return "now"
    return "failed" if run.state == "failed" or run.phase in (*TAKEN_BACK, "quarantined") else "done"


def _latest(events: Sequence[RunEvent]) -> dict[str, Any] | None:
    progress = [event for event in events if event.kind == "progress"]
    return {"step": progress[-1].step, **progress[-1].payload} if progress else None


# --- the evaluation ---------------------------------------------------------------------------------------


def _scores(evaluation: Evaluation | None) -> list[Score]:
    """One row a slice, the target first."""
    slices: dict[str, dict[str, Any]] = evaluation.summary.get("slices", {}) if evaluation else {}
    ordered = sorted(slices.items(), key=lambda pair: (pair[0] != TARGET, pair[0]))
    return [
        Score(name, row["rows"], row["baseline"], row["candidate"], row["delta"], row["low"], row["high"])
        for name, row in ordered
    ]


def _outcomes(evaluation: Evaluation | None) -> Outcomes:
    slices = evaluation.summary.get("slices", {}).values() if evaluation else ()
    return Outcomes(*(sum(row[name] for row in slices) for name in ("wins", "ties", "losses")))


def outcome_of(row: EvaluationRow, metric: str) -> str:
    """ "win", "tie" or "loss" of the candidate on a row."""
    ours, theirs = row.candidate_scores.get(metric, 0.0), row.baseline_scores.get(metric, 0.0)
    return "win" if ours > theirs else "loss" if ours < theirs else "tie"


def before_and_after(summary: dict[str, Any] | None) -> tuple[float | None, float | None]:
    """The deciding metric on the target slice, under the baseline and under the candidate."""
    target = (summary or {}).get("slices", {}).get(TARGET)
    return (target["baseline"], target["candidate"]) if target else (None, None)
