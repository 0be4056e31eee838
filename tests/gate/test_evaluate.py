"""The evaluate job with a real engine and a really trained adapter: scored, decided, handed on."""

from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import func, select

from engine.messages import Generate, Sampling
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import datasets, evaluations, examples, jobs, revisions, runs
from services.store.examples import Draft
from services.store.jobs import JobCancelled, JobFailed
from services.store.models import Artifact, DeploymentEvent, Evaluation, EvaluationRow, Interaction, Job, Revision, Run
from tests.curation.world import World
from tests.gate.conftest import Trained
from worker.gate.evaluate import evaluate_job
from worker.gate.score import EvaluationInterrupted, Kept, ask_all, ask_answer

NOTHING_KEPT = Kept(lambda _weights, _keys: {}, lambda _weights, _answers: None)


def draft(prompt: str, completion: str, source: str = "corrected") -> Draft:
    return Draft(
        kind="completion", source=source, split="held_out", slice="target" if source == "corrected" else "accepted",
        group_key=prompt, messages=[{"role": "user", "content": prompt}], completion=completion, rejected=None,
        interaction_id=None, annotation_ids=(), reviewers=("a", "b"),
    )  # fmt: skip


def start(world: World, trained: Trained, drafts: list[Draft], digest: str | None = None) -> Run:
    """A run whose adapter is built and whose evaluate job waits."""
    chosen = digest or trained.adapter.digest
    with world.sessions.begin() as session:
        dataset = datasets.get_or_create(session, world.project_id, "golden")
        added = examples.add_examples(session, world.project_id, drafts)
        revision = revisions.create(session, dataset, added, {})
        run = runs.start(session, world.project(session), params={}, created_by="ada", revision=revision)
        session.add(
            Artifact(
                digest=chosen, kind="adapter", project_id=world.project_id, run_id=run.id,
                base_digest=trained.adapter.manifest["base"], manifest={}, state="built",
            )
        )  # fmt: skip
        session.flush()
        run.artifact_digest = chosen
        runs.hand_over(session, run, "evaluate", {"run_id": str(run.id)})
        return run


def evaluate(world: World, run: Run, settings: Settings) -> None:
    assert run.job_id is not None
    lease = jobs.claim(world.sessions, run.job_id, "test")
    assert lease is not None
    with lease:
        evaluate_job(lease, settings)


def state_of(world: World, run_id: UUID) -> Run:
    with world.sessions() as session:
        return session.get_one(Run, run_id)


def artifact_state(world: World, digest: str) -> str:
    with world.sessions() as session:
        return session.get_one(Artifact, digest).state


def corrected(count: int, answer: str = "yes") -> list[Draft]:
    return [draft(f"please number {index}", answer) for index in range(count)]


def test_a_better_adapter_is_verified_and_handed_to_deployment(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    run = start(world, trained, corrected(40))

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        done = session.get_one(Run, run.id)
        evaluation = session.scalars(select(Evaluation)).one()
        rows = session.scalars(select(EvaluationRow)).all()
        job = session.get_one(Job, done.job_id)
        revision = session.get_one(Revision, done.revision_id)
        assert session.scalar(select(func.count()).select_from(Interaction)) == 0
        wins = evaluations.rows(session, evaluation.id, outcome="win", limit=100)
    assert evaluation.decision == "promote", evaluation.reasons
    assert (evaluation.candidate_digest, evaluation.baseline_digest) == (trained.adapter.digest, None)
    assert len(rows) == len(wins) == 40
    assert {row.candidate_output for row in rows} == {"yes"}
    assert "yes" not in {row.baseline_output for row in rows}
    assert evaluation.summary["means"]["exact_match"] == {"baseline": 0.0, "candidate": 1.0}
    assert evaluation.summary["slices"]["target"]["wins"] == 40
    assert (job.kind, job.payload) == (
        "deploy",
        {"project_id": str(world.project_id), "digest": trained.adapter.digest, "run_id": str(run.id)},
    )
    assert artifact_state(world, trained.adapter.digest) == "verified"
    assert (revision.looks, revision.look_carry) == (1, 0.025)
    assert evaluation.summary["sources"]["candidate"] == {"exact_match": 40}
    with world.sessions() as session:
        verified = session.scalars(select(DeploymentEvent).where(DeploymentEvent.kind == "verified")).one()
        assert verified.reason == "better on what was corrected; general ability unknown"
        progress = [event.payload for event in runs.events(session, run.id) if event.kind == "evaluating"]
    assert progress[-1] == {"done": 80, "total": 80}


def test_an_adapter_that_is_no_better_is_rejected_and_the_run_ends_refused(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    run = start(world, trained, corrected(35, "no"))

    evaluate(world, run, engine_settings)

    done = state_of(world, run.id)
    assert (done.state, done.phase) == ("succeeded", "refused")
    assert artifact_state(world, trained.adapter.digest) == "rejected"
    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
        assert evaluation is not None
        assert evaluation.decision == "refuse"
        assert evaluation.reasons[0].startswith("not shown to be better")
        assert session.scalars(select(Job).where(Job.kind == "deploy")).all() == []


def test_an_adapter_that_breaks_what_was_right_is_rejected(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    world.configure(metrics=["similarity"])
    tokenizer = Tokenizer.load(trained.model)
    accepted = [f"user number {index}" for index in range(20)]
    with SyncEngineClient(engine_settings.engine_socket) as client:
        said = client.generate_many(
            [
                Generate(
                    id=f"g{index}", prompt=tokenizer.encode_chat([{"role": "user", "content": prompt}]),
                    sampling=Sampling(temperature=0.0, seed=0, max_tokens=30),
                )
                for index, prompt in enumerate(accepted)
            ]
        )  # fmt: skip
    right = [
        draft(prompt, tokenizer.decode(answer.token_ids), "accepted")
        for prompt, answer in zip(accepted, said, strict=True)
    ]
    run = start(world, trained, corrected(35) + right)

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
    assert evaluation is not None
    assert evaluation.decision == "refuse"
    assert evaluation.reasons[0].startswith("worse on accepted")
    assert evaluation.summary["slices"]["target"]["low"] > 0


def test_too_few_held_out_rows_are_refused_with_how_many_are_missing(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    none, few = start(world, trained, []), corrected(4)
    evaluate(world, none, engine_settings)
    with world.sessions.begin() as session:
        first = evaluations.of_run(session, none.id)
        session.get_one(Run, none.id).artifact_digest = None
        session.delete(session.get_one(Artifact, trained.adapter.digest))
    run = start(world, trained, few)
    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        second = evaluations.of_run(session, run.id)
    assert first is not None
    assert second is not None
    assert first.reasons == ["too few held-out corrections to judge by: 0 groups, needs 30 more"]
    assert second.reasons == ["too few held-out corrections to judge by: 4 groups, needs 26 more"]
    assert second.summary["needed"] == 26


def test_a_broken_adapter_file_is_quarantined_and_nothing_else_changes(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    digest = "ab" * 32
    broken = trained.home / "artifacts" / digest
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    run = start(world, trained, corrected(31), digest)

    with pytest.raises(JobFailed, match="refused the adapter"):
        evaluate(world, run, engine_settings)

    assert artifact_state(world, digest) == "quarantined"
    assert state_of(world, run.id).phase == "quarantined"
    with world.sessions() as session:
        assert session.scalars(select(Evaluation)).all() == []


def test_a_cancelled_run_stores_no_decision_and_costs_no_look(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    run = start(world, trained, corrected(31))
    assert run.job_id is not None
    lease = jobs.claim(world.sessions, run.job_id, "test")
    assert lease is not None
    with world.sessions.begin() as session:
        runs.request_cancel(session, run.id)

    with lease, pytest.raises(JobCancelled):
        evaluate_job(lease, engine_settings)

    assert state_of(world, run.id).state == "cancelled"
    with world.sessions() as session:
        assert session.scalars(select(Evaluation)).all() == []
        assert session.scalars(select(Revision.looks)).all() == [0]


def test_a_misconfigured_gate_fails_the_run_and_says_why(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    world.configure(metrics=["bleu"])
    run = start(world, trained, corrected(31))

    with pytest.raises(JobFailed, match="bleu"):
        evaluate(world, run, engine_settings)

    assert state_of(world, run.id).state == "failed"


def test_an_adapter_that_is_not_loaded_interrupts_instead_of_scoring_zero(
    trained: Trained, engine_settings: Settings
) -> None:
    tokenizer = Tokenizer.load(trained.model)
    asked = ask_answer(tokenizer, UUID(int=1), [{"role": "user", "content": "say"}], "yes", 128)

    with (
        SyncEngineClient(engine_settings.engine_socket) as client,
        pytest.raises(EvaluationInterrupted, match="not loaded"),
    ):
        ask_all(client, tokenizer, "cd" * 32, [asked], NOTHING_KEPT)


def test_a_prompt_beyond_the_context_is_an_empty_answer_for_both(trained: Trained, engine_settings: Settings) -> None:
    tokenizer = Tokenizer.load(Path(trained.model))
    asked = ask_answer(tokenizer, UUID(int=1), [{"role": "user", "content": "number " * 300}], "yes", 128)

    with SyncEngineClient(engine_settings.engine_socket) as client:
        told = ask_all(client, tokenizer, None, [asked], NOTHING_KEPT)
    assert (told[asked.key].output, told[asked.key].finish_reason) == ("", "error")
