"""The evaluate job beyond its main path: answers kept, verdicts reused, likelihood, checks, base ability, overrides."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from uuid import UUID

import pytest
from sqlalchemy import func, select

from engine.messages import Generate, Sampling
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.errors import Conflict, InvalidRequest
from services.settings import Settings
from services.store import base_ability, evaluations, examples, failpoints, jobs, replay, runs
from services.store.evaluation_config import BASE_ABILITY
from services.store.examples import Draft
from services.store.models import (
    Artifact,
    AuditEvent,
    Dataset,
    DeploymentEvent,
    EvaluationAnswer,
    EvaluationRow,
    Example,
    Job,
    Revision,
    Run,
)
from tests.curation.world import World
from tests.gate.conftest import Trained
from tests.gate.test_evaluate import NOTHING_KEPT, corrected, draft, evaluate, start
from worker.gate.evaluate import evaluate_job
from worker.gate.judge import CHOICES
from worker.gate.score import Ask, ask_all, ask_answer, ask_likelihood


class Counter:
    """Counts the requests that reach the engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        real = SyncEngineClient.generate_many

        def counting(client: SyncEngineClient, messages: list[object], **options: int) -> object:
            self.asked += len(messages)
            return real(client, messages, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(SyncEngineClient, "generate_many", counting)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def again(world: World, trained: Trained, drafts: list[Draft]) -> Run:
    """Another run with the same artefact, as if it had been trained anew."""
    with world.sessions.begin() as session:
        for run in session.scalars(select(Run)):
            runs.finish(session, run, "succeeded", "live")
            run.artifact_digest = None
        session.flush()
        session.delete(session.get_one(Artifact, trained.adapter.digest))
    return start(world, trained, drafts)


def test_a_second_evaluation_asks_nothing_that_was_answered_before(
    world: World, trained: Trained, engine_settings: Settings, counter: Counter
) -> None:
    drafts = corrected(35, "no")
    evaluate(world, start(world, trained, drafts), engine_settings)
    first = counter.asked

    evaluate(world, again(world, trained, drafts), engine_settings)

    assert (first, counter.asked) == (70, 70)
    with world.sessions() as session:
        assert session.scalars(select(Revision.looks)).all() == [2]
        outputs = session.execute(select(EvaluationRow.example_id, EvaluationRow.candidate_output).distinct()).all()
    assert len(outputs) == 35


def test_an_interrupted_evaluation_goes_on_where_it_was(
    world: World, trained: Trained, engine_settings: Settings, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(world, trained, corrected(40))
    stops = iter(["evaluate.chunk", "evaluate.chunk"])

    def stop(name: str) -> None:
        if name == "evaluate.chunk" and next(stops, None) is None:
            raise RuntimeError("killed")

    monkeypatch.setattr(failpoints, "reach", stop)
    assert run.job_id is not None
    lease = jobs.claim(world.sessions, run.job_id, "test")
    assert lease is not None
    with lease, pytest.raises(RuntimeError, match="killed"):
        evaluate_job(lease, engine_settings)
    monkeypatch.undo()
    counting = Counter(monkeypatch)
    lease.fail("killed", "", retry=True)
    with world.sessions.begin() as session:
        session.get_one(Job, run.job_id).not_before = func.now()
    evaluate(world, run, engine_settings)

    assert counting.asked == 80 - 32 - 8 - 32
    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
        assert evaluation is not None
        assert evaluation.decision == "promote"


def test_answers_of_weights_that_are_compared_no_more_are_dropped(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    run = start(world, trained, corrected(31))
    with world.sessions.begin() as session:
        example = session.scalars(select(Example)).first()
        assert example is not None
        session.add(
            EvaluationAnswer(
                example_id=example.id, weights="long gone", request_hash="h", project_id=world.project_id, output="",
                finish_reason="stop", tokens=0,
            )
        )  # fmt: skip

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        weights = set(session.scalars(select(EvaluationAnswer.weights)))
    assert len(weights) == 2
    assert "long gone" not in weights


def test_the_likelihood_of_the_correction_is_that_of_saying_it(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    world.configure(metrics=["likelihood", "exact_match"])
    run = start(world, trained, corrected(35))

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
    assert evaluation is not None
    means = evaluation.summary["means"]
    tokenizer = Tokenizer.load(trained.model)
    with SyncEngineClient(engine_settings.engine_socket) as client:
        asked = ask_answer(tokenizer, UUID(int=1), [{"role": "user", "content": "please number 3"}], "yes", 128)
        said = client.generate(
            Generate(
                id="said", prompt=asked.token_ids, adapter=trained.adapter.digest,
                sampling=Sampling(temperature=0.0, seed=0, max_tokens=9, stop_token_ids=tokenizer.eos_ids),
            )
        )  # fmt: skip
        told = ask_all(
            client, tokenizer, trained.adapter.digest,
            [ask_likelihood(tokenizer, UUID(int=1), [{"role": "user", "content": "please number 3"}], "yes")],
            NOTHING_KEPT,
        )  # fmt: skip
    [answer] = told.values()
    assert answer.likelihood == pytest.approx(math.exp(fmean(said.logprobs)), rel=1e-3)
    assert means["likelihood"]["candidate"] == pytest.approx(answer.likelihood, rel=0.2)
    assert means["likelihood"]["candidate"] > 2 * means["likelihood"]["baseline"] > 0
    assert evaluation.summary["metric"] == "likelihood"


def test_what_people_said_of_an_identical_output_is_not_judged_again(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    """The golden answer is "no", yet people accepted "yes" to ten of these prompts and rejected it to five."""
    for index in range(15):
        item = world.item(world.log(f"please number {index}", "yes"), "held_out")
        for reviewer in range(2):
            world.judge(item, "accept" if index < 10 else "reject", reviewer=reviewer)
    run = start(world, trained, corrected(35, "no"))

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
        rows = session.scalars(select(EvaluationRow)).all()
    assert evaluation is not None
    assert evaluation.summary["sources"]["candidate"] == {"people": 15, "exact_match": 20}
    assert evaluation.summary["sources"]["baseline"] == {"exact_match": 35}
    assert sum(row.candidate_scores["exact_match"] for row in rows) == 10


def test_checks_are_measured_by_name(world: World, trained: Trained, engine_settings: Settings) -> None:
    world.configure(metrics=["exact_match"], checks=[{"name": "short", "must_match": "^yes$"}])
    run = start(world, trained, corrected(31))

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
    assert evaluation is not None
    assert evaluation.summary["means"]["check:short"] == {"baseline": 0.0, "candidate": 1.0}
    assert evaluation.summary["means"]["checks"]["candidate"] == 1
    assert evaluation.summary["answers"]["candidate"]["refused"] == 0


@pytest.fixture
def shipped(trained: Trained) -> Iterator[Path]:
    """A base-ability set beside the model's weights: what the base says to forty prompts, by itself."""
    path = trained.model / base_ability.SHIPPED
    line = '{{"messages": [{{"role": "user", "content": "tell {0}"}}, {{"role": "assistant", "content": "{1}"}}]}}'
    path.write_text("\n".join(line.format(index, "something long and general") for index in range(40)) + "\n")
    yield path
    path.unlink()


def test_the_set_that_a_model_ships_is_imported_once_and_guards(
    world: World, trained: Trained, engine_settings: Settings, shipped: Path
) -> None:
    assert shipped.is_file()
    run = start(world, trained, corrected(35))
    evaluate(world, run, engine_settings)
    evaluate(world, again(world, trained, corrected(35)), engine_settings)

    with world.sessions() as session:
        names = session.scalars(select(Dataset.name).order_by(Dataset.name)).all()
        evaluation = evaluations.of_run(session, run.id)
        guarded = session.scalars(select(EvaluationRow).where(EvaluationRow.slice == BASE_ABILITY)).all()
    assert names == [base_ability.NAME, "golden"]
    assert evaluation is not None
    assert evaluation.summary["slices"][BASE_ABILITY]["rows"] == 40
    assert len(guarded) == 80
    assert {row.details["candidate"]["source"] for row in guarded} == {"similarity"}
    assert any(BASE_ABILITY in reason for reason in evaluation.reasons)


def test_without_a_base_ability_set_the_decision_says_so(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    run = start(world, trained, corrected(35))

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
    assert evaluation is not None
    assert "no base-ability set" in evaluation.reasons[-1]


def test_general_prompts_that_the_run_was_taught_or_replayed_do_not_guard(
    world: World, trained: Trained, engine_settings: Settings, shipped: Path
) -> None:
    taught, replayed = (
        replace(draft(f"tell {number}", "as trained"), split="train", source="imported", reviewers=("bela",))
        for number in (3, 5)
    )
    run = start(world, trained, [*corrected(35), taught])
    with world.sessions.begin() as session:
        [entry] = examples.add_examples(session, world.project_id, [replayed])
        replay.keep(session, run.id, [session.get_one(Example, entry.example_id)])

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
        guarded = session.scalars(
            select(Example.messages)
            .join(EvaluationRow, EvaluationRow.example_id == Example.id)
            .where(EvaluationRow.slice == BASE_ABILITY)
        ).all()
    asked = {messages[0]["content"] for messages in guarded}
    assert asked == {f"tell {number}" for number in range(40) if number not in (3, 5)}
    assert evaluation is not None
    assert evaluation.summary["general_left_out"] == {"own_task": 0, "trained": 2}
    assert evaluation.reasons[-1] == "2 of the 40 rows of base-ability are left out, as the run was trained on them"


def test_a_set_that_is_all_of_the_projects_own_task_is_not_called_missing(
    world: World, trained: Trained, engine_settings: Settings, shipped: Path
) -> None:
    system = {"role": "system", "content": "You are the desk."}
    lines = [json.loads(line) for line in shipped.read_text().splitlines()]
    own = [{"messages": [system, *line["messages"]]} for line in lines]
    shipped.write_text("\n".join(json.dumps(line) for line in own) + "\n")
    held = [replace(one, messages=[system, *one.messages]) for one in corrected(35)]
    run = start(world, trained, held)

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
    assert evaluation is not None
    assert evaluation.reasons[-1] == (
        "nothing says whether general ability stays: of the 40 rows of base-ability 40 are of the project’s own task"
    )


def test_no_run_is_trained_on_the_set_that_measures(world: World) -> None:
    with world.sessions.begin() as session:
        project = world.project(session)
        for chosen in ({"dataset": BASE_ABILITY}, {"params": {"replay_from": BASE_ABILITY}}):
            with pytest.raises(InvalidRequest, match="no run is trained on it"):
                runs.start(session, project, **{"params": {}, "created_by": "ada", **chosen})  # type: ignore[arg-type]


def test_a_person_may_override_a_refusal_once_with_a_reason_and_it_shows(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    run = start(world, trained, corrected(35, "no"))
    evaluate(world, run, engine_settings)

    with world.sessions.begin() as session:
        evaluation = evaluations.of_run(session, run.id)
        assert evaluation is not None
        with pytest.raises(InvalidRequest, match="say why"):
            evaluations.override(session, evaluation, actor="user:1", reason="  because ")
        evaluations.override(session, evaluation, actor="user:1", reason="The metric punishes a new date format.")
        with pytest.raises(Conflict, match="already"):
            evaluations.override(session, evaluation, actor="user:2", reason="And once more, to be sure.")

    with world.sessions() as session:
        done = session.get_one(Run, run.id)
        job = session.get_one(Job, done.job_id)
        event = session.scalars(select(DeploymentEvent).where(DeploymentEvent.kind == "override")).one()
        actions = session.scalars(select(AuditEvent.action)).all()
        evaluation = evaluations.of_run(session, run.id)
        assert session.get_one(Artifact, trained.adapter.digest).state == "verified"
    assert evaluation is not None
    assert (evaluation.decision, evaluation.overridden_by) == ("refuse", "user:1")
    assert (done.state, done.phase, done.finished_at) == ("running", "deploying", None)
    assert job.kind == "deploy"
    assert job.payload["digest"] == trained.adapter.digest
    assert (event.kind, event.reason) == ("override", "The metric punishes a new date format.")
    assert "deployment.override" in actions


def test_what_was_promoted_or_runs_beside_another_run_cannot_be_overridden(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    run = start(world, trained, corrected(35, "no"))
    evaluate(world, run, engine_settings)
    with world.sessions.begin() as session:
        runs.start(session, world.project(session), params={}, created_by="ada")

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
        assert evaluation is not None
        with pytest.raises(Conflict, match="unfinished"):
            evaluations.override(session, evaluation, actor="user:1", reason="It is better, believe me.")
        session.rollback()
        evaluation = evaluations.of_run(session, run.id)
        assert evaluation is not None
        evaluation.decision = "promote"
        session.flush()
        with pytest.raises(Conflict, match="only a refusal"):
            evaluations.override(session, evaluation, actor="user:1", reason="It is better, believe me.")


def test_a_judge_can_say_nothing_but_its_choices(trained: Trained, engine_settings: Settings) -> None:
    tokenizer = Tokenizer.load(trained.model)
    asked = Ask(UUID(int=1), tokenizer.encode_chat([{"role": "user", "content": "A or B"}]), 8, grammar=CHOICES)

    with SyncEngineClient(engine_settings.engine_socket) as client:
        told = ask_all(client, tokenizer, None, [asked], NOTHING_KEPT)

    assert told[asked.key].output in ("A", "B", "tie")


def test_requests_that_differ_in_anything_have_keys_of_their_own() -> None:
    plain = Ask(UUID(int=1), [1, 2, 3], 8)
    others = [
        plain._replace(example_id=UUID(int=2)), plain._replace(token_ids=[1, 2, 4]), plain._replace(max_tokens=9),
        plain._replace(scored_from=2), plain._replace(grammar=CHOICES),
    ]  # fmt: skip

    assert len({ask.key for ask in [plain, *others]}) == 6
