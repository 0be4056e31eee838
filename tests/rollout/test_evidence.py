"""Every step of an artefact's life keeps what it rests on: the real jobs, without an engine's weights."""

from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import update

from services.settings import Settings
from services.store import deployments, evaluations, jobs, runs
from services.store.jobs import JobFailed
from services.store.models import DeploymentEvent, EvaluationRow, Project
from tests.rollout.conftest import World
from tests.rollout.slots import TOO_HIGH, Slots
from worker.gate import evaluate
from worker.rollout import swap
from worker.rollout.reconcile import Reconciler
from worker.rollout.verify import Comparison, GoldenPrompt
from worker.tasks import HANDLERS
from worker.training import artifact

GOOD, LET_THROUGH, BROKEN, REFUSED = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
DAMAGED = "the file is damaged"


class Life:
    """Runs that have built their adapters, and an engine that serves none yet."""

    def __init__(self, world: World, settings: Settings, patch: pytest.MonkeyPatch) -> None:
        self.world, self.settings, self.slots = world, settings, Slots()
        self._patch = patch
        patch.setattr(swap, "SyncEngineClient", lambda *_, **__: self.slots)
        patch.setattr(swap, "golden_prompts", lambda *_, **__: [GoldenPrompt([], "")])
        patch.setattr(swap, "compare", lambda *_: Comparison(8, []))
        patch.setattr(swap.Tokenizer, "load", lambda *_: None)

    def built(self, digest: str) -> UUID:
        """As the trainer's job leaves it: the artefact recorded, the run handed to the gate."""
        with self.world.sessions.begin() as session:
            project = session.get_one(Project, self.world.project_id)
            run = runs.start(session, project, params={}, created_by="ada")
            run.revision_id = self.world.revision_id
            manifest = {"kind": "adapter", "base": "base"}
            artifact.record(session, artifact.Built(digest, manifest), project_id=project.id, run_id=run.id)
            run.artifact_digest = digest
            runs.hand_over(session, run, "evaluate", {"run_id": str(run.id)})
            return run.id

    def judged(self, run_id: UUID, compare: Callable[..., evaluate.Result]) -> None:
        self._patch.setattr(evaluate, "_compare", compare)
        self.work(run_id)

    def scored(self, candidate: float) -> Callable[..., evaluate.Result]:
        """Every held-out row wrong before, and `candidate` right after."""
        rows = [
            EvaluationRow(
                example_id=example, slice="target", group_key=str(place), baseline_output="", candidate_output="",
                baseline_scores={"exact_match": 0.0}, candidate_scores={"exact_match": candidate},
                details={side: {"source": "exact_match", "tokens": 1, "finish": "stop", "refused": False}
                         for side in ("baseline", "candidate")},
            )
            for place, example in enumerate(self.world.example_ids)
        ]  # fmt: skip
        return lambda *_: evaluate.Result(rows, None)

    def work(self, run_id: UUID) -> None:
        """What the run waits for, as a worker takes it."""
        with self.world.sessions() as session:
            job_id = runs.get(session, run_id).job_id
        assert job_id is not None
        lease = jobs.claim(self.world.sessions, job_id, "w")
        assert lease is not None
        with lease:
            HANDLERS[lease.kind](lease, self.settings)

    def events(self) -> list[DeploymentEvent]:
        """Oldest first."""
        with self.world.sessions() as session:
            return deployments.events(session, self.world.project_id)[::-1]

    def of(self, digest: str) -> dict[str, DeploymentEvent]:
        return {event.kind: event for event in self.events() if event.to_digest == digest}


@pytest.fixture
def life(world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Life:
    with world.sessions.begin() as session:
        session.execute(update(Project).values(config={"rollout": {"mode": "direct"}, "min_held_out": 5}))
    return Life(world, settings, monkeypatch)


@pytest.fixture
def settings(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a machine whose model nobody reads."""
    for name, value in {"WHET_HOME": tmp_path, "WHET_MODEL": tmp_path, "DATABASE_URL": database_url}.items():
        monkeypatch.setenv(name, str(value))
    return Settings()


def go_live(life: Life, digest: str) -> UUID:
    run_id = life.built(digest)
    life.judged(run_id, life.scored(1.0))
    life.work(run_id)
    return run_id


def test_from_built_to_live_each_event_names_its_run_and_comparison(life: Life) -> None:
    run_id = go_live(life, GOOD)

    told = life.of(GOOD)
    assert list(told) == ["built", "verified", "staged", "flip"]
    with life.world.sessions() as session:
        evaluation = evaluations.of_run(session, run_id)
    assert evaluation is not None
    assert {event.evidence["run_id"] for event in told.values()} == {str(run_id)}
    target = evaluation.summary["slices"]["target"]
    for kind in ("verified", "staged", "flip"):
        assert told[kind].evidence["evaluation"] == str(evaluation.id)
        assert told[kind].evidence["target"] == [1.0, target["low"], target["high"]]
        assert told[kind].evidence["reasons"] == evaluation.reasons
    assert told["flip"].evidence["golden_prompts"] == 8


def test_a_rejection_says_why_in_the_gates_words_and_an_override_keeps_them(life: Life) -> None:
    run_id = life.built(LET_THROUGH)
    life.judged(run_id, life.scored(0.0))
    with life.world.sessions.begin() as session:
        evaluation = evaluations.of_run(session, run_id)
        assert evaluation is not None
        evaluations.override(session, evaluation, actor="ada", reason="the new product names matter more")
    life.work(run_id)

    told = life.of(LET_THROUGH)
    assert list(told) == ["built", "rejected", "override", "staged", "flip"]
    assert told["rejected"].reason.startswith("not shown to be better on what was corrected: ")
    assert told["rejected"].reason.split("; ")[0] == evaluation.reasons[0]
    assert told["override"].reason == "the new product names matter more"
    for event in (told["rejected"], told["override"], told["flip"]):
        assert event.evidence["evaluation"] == str(evaluation.id)
        assert event.evidence["target"][0] == 0.0
        assert event.evidence["reasons"] == evaluation.reasons


def test_a_quarantine_keeps_the_engines_words_wherever_it_comes_from(life: Life) -> None:
    at_the_gate, at_the_swap = life.built(BROKEN), None

    def refuse(*_: object) -> evaluate.Result:
        raise evaluate.Broken(f"the engine refused the adapter: {DAMAGED}")

    with pytest.raises(JobFailed):
        life.judged(at_the_gate, refuse)
    at_the_swap = life.built(REFUSED)
    life.judged(at_the_swap, life.scored(1.0))
    life.slots.refuses = {REFUSED}
    with pytest.raises(JobFailed):
        life.work(at_the_swap)

    for run_id, digest, words in ((at_the_gate, BROKEN, DAMAGED), (at_the_swap, REFUSED, TOO_HIGH)):
        event = life.of(digest)["quarantined"]
        assert words in event.reason
        assert event.evidence["run_id"] == str(run_id)


def test_every_event_that_the_platform_writes_carries_evidence(life: Life) -> None:
    for digest in (GOOD, LET_THROUGH):
        go_live(life, digest)
    life.slots.refuses, life.slots.loaded = {GOOD, LET_THROUGH}, []
    reconciler = Reconciler(life.world.sessions, life.slots, Path("artifacts"))  # type: ignore[arg-type]
    reconciler.step()
    reconciler.step()

    told = life.events()
    assert [event.kind for event in told][-4:] == ["flip", "roll_back", "roll_back", "frozen"]
    bare = [(event.kind, event.reason) for event in told if not event.evidence.keys() - {"states"}]
    assert bare == []
    assert [event.evidence["engine"] for event in told if event.kind == "roll_back"] == ["engine", "engine"]
    assert told[-1].evidence == {"automatic_rollbacks": 2}
